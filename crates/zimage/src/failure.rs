//! Errors as people read them.

use anyhow::Error;

/// Why something failed, cause by cause. Of each the first line, since libtorch puts some twenty lines of
/// C++ stack behind it, and nothing that the causes before have said already.
pub fn described(error: &Error) -> String {
    let mut text = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        let line = cause.lines().next().unwrap_or_default();
        if !text.contains(line) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(line);
        }
    }
    text
}

/// Whether libtorch had no memory left, by what it says of the CPU and of GPUs.
pub fn is_out_of_memory(error: &Error) -> bool {
    let text = described(error);
    ["out of memory", "tried to allocate"].iter().any(|words| text.contains(words))
}

/// Whether a folder holds the state of another run.
pub fn is_other_run(error: &Error) -> bool {
    let is_other = |cause: &(dyn std::error::Error + 'static)| {
        matches!(cause.downcast_ref(), Some(tch_training::Error::OtherRun { .. }))
    };
    error.chain().any(is_other)
}
