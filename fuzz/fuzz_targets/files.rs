//! Files from strangers: what the fuzzer makes is read in place of a file that a reader takes. The first byte says of
//! which one.
#![no_main]

#[path = "../../crates/zimage/tests/common/readers.rs"]
mod readers;

use std::fs;
use std::path::Path;

use libfuzzer_sys::{Corpus, fuzz_target};
use readers::{Reader, readers};
use tempfile::TempDir;

/// The files are kept here.
struct Folder {
    _folder: TempDir,
    readers: Vec<Reader>,
}

thread_local! {
    static FOLDER: Folder = {
        let folder = tempfile::tempdir().expect("a folder");
        let references = Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/zimage/tests/reference");
        let readers = readers(folder.path(), &references).expect("the files of the references");
        // The tokenizers library panics on some files, which our reader catches; libfuzzer would end the process.
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let file = panic.location().map(std::panic::Location::file).unwrap_or_default();
            if !file.contains("tokenizers") {
                hook(panic);
            }
        }));
        write_seeds(&readers).expect("the corpus");
        Folder { _folder: folder, readers }
    };
}

/// The files as they are, for a corpus that begins empty.
fn write_seeds(readers: &[Reader]) -> std::io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/files");
    fs::create_dir_all(&corpus)?;
    for (index, reader) in (0u8..).zip(readers) {
        let seed = [&[index], &fs::read(&reader.path)?[..]].concat();
        fs::write(corpus.join(format!("seed-{index:02}")), seed)?;
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| -> Corpus {
    let Some((first, data)) = data.split_first() else { return Corpus::Reject };
    FOLDER.with(|Folder { readers, .. }| {
        let Some(Reader { path, read, .. }) = readers.get(usize::from(*first)) else {
            return Corpus::Reject;
        };
        fs::write(path, data).expect("writing the file");
        let _ = read();
        Corpus::Keep
    })
});
