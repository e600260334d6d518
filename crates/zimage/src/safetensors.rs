//! The safetensors format: eight bytes with the header's length, a header in JSON, the tensors' bytes.
//!
//! Parsed here, because files come from strangers: every number is checked before it is used, and an
//! error names the tensor.

use std::collections::BTreeMap;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde::de::IgnoredAny;
use tch::Kind;

/// Bytes of the header's length.
const PREFIX: usize = 8;
/// Longest header that the format allows.
const LONGEST_HEADER: u64 = 100_000_000;

/// What a file says about one tensor.
#[derive(Clone, Debug)]
pub struct Entry {
    pub kind: Kind,
    pub shape: Vec<i64>,
    /// Where its bytes lie in the file: inside the file, and as many as kind and shape need.
    pub bytes: Range<usize>,
}

#[derive(Deserialize)]
struct Header {
    #[serde(rename = "__metadata__", default)]
    _metadata: IgnoredAny,
    #[serde(flatten)]
    tensors: BTreeMap<String, Declared>,
}

#[derive(Deserialize)]
struct Declared {
    dtype: String,
    shape: Vec<u64>,
    /// Begin and end, counted from the end of the header.
    data_offsets: [u64; 2],
}

/// The tensors of a file by name.
///
/// # Errors
/// If the header is broken, a dtype is not supported, or the tensors do not fill the file exactly, one
/// after the other, as the format demands.
pub fn entries(file: &[u8]) -> Result<BTreeMap<String, Entry>> {
    let prefix = file
        .first_chunk::<PREFIX>()
        .with_context(|| format!("{} bytes are too few for a safetensors file", file.len()))?;
    let length = u64::from_le_bytes(*prefix);
    ensure!(
        length <= LONGEST_HEADER && length <= (file.len() - PREFIX) as u64,
        "the header should have {length} bytes, but the file has {} (cut short, or not safetensors?)",
        file.len()
    );
    let start = PREFIX + length as usize;
    let header: Header =
        serde_json::from_slice(&file[PREFIX..start]).context("the header is not valid")?;
    let available = (file.len() - start) as u64;
    let end = header.tensors.values().map(|tensor| tensor.data_offsets[1]).max().unwrap_or(0);
    ensure!(
        end == available,
        "the header describes {end} bytes of tensors, but the file has {available} (cut short?)"
    );

    let mut tensors: Vec<_> = header.tensors.into_iter().collect();
    tensors.sort_by_key(|(_, tensor)| tensor.data_offsets);
    let mut expected_begin = 0;
    tensors
        .into_iter()
        .map(|(name, tensor)| {
            let [begin, end] = tensor.data_offsets;
            ensure!(
                begin == expected_begin && begin <= end,
                "tensor {name} lies at bytes {begin}..{end}, but should begin at {expected_begin}"
            );
            expected_begin = end;
            let entry = entry(&tensor, start).with_context(|| format!("tensor {name}"))?;
            Ok((name, entry))
        })
        .collect()
}

/// Checks kind and shape against the number of bytes, which is known to lie in the file.
fn entry(tensor: &Declared, start: usize) -> Result<Entry> {
    let kind = kind(&tensor.dtype)?;
    let [begin, end] = tensor.data_offsets;
    // An axis of length zero must not hide an overflow of the others, which libtorch multiplies too.
    let largest = tensor.shape.iter().try_fold(kind.elt_size_in_bytes() as u64, |product, axis| {
        product.checked_mul((*axis).max(1)).filter(|bytes| *bytes <= i64::MAX as u64)
    });
    let needed = if tensor.shape.contains(&0) { largest.map(|_| 0) } else { largest };
    ensure!(
        needed == Some(end - begin),
        "shape {:?} of {} does not fit {} bytes",
        tensor.shape,
        tensor.dtype,
        end - begin
    );
    Ok(Entry {
        kind,
        shape: tensor.shape.iter().map(|axis| *axis as i64).collect(),
        bytes: start + begin as usize..start + end as usize,
    })
}

fn kind(dtype: &str) -> Result<Kind> {
    Ok(match dtype {
        "F64" => Kind::Double,
        "F32" => Kind::Float,
        "F16" => Kind::Half,
        "BF16" => Kind::BFloat16,
        "I64" => Kind::Int64,
        "I32" => Kind::Int,
        "I16" => Kind::Int16,
        "I8" => Kind::Int8,
        "U8" => Kind::Uint8,
        other => bail!("dtype {other} is not supported (F64, F32, F16, BF16 and integers are)"),
    })
}
