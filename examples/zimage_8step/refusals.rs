//! Options that what was asked for would not look at.

use anyhow::{Result, bail};

use super::Options;

impl Options {
    /// Refuses what training would not look at.
    ///
    /// # Errors
    /// Names the option.
    pub fn refuse_sampling(&self) -> Result<()> {
        let options = [
            ("student", self.student.is_some() && self.export.is_none()),
            ("count", self.count.is_some()),
            ("tensors", self.tensors),
        ];
        refuse(&options, || "pictures of a prompt: give one with --sample".to_owned())
    }

    /// Refuses what the embedded model would not look at.
    ///
    /// # Errors
    /// Names the option.
    pub fn refuse_released(&self) -> Result<()> {
        let options = [
            ("prompt-file", self.prompt_file.is_some()),
            ("negative-prompt", self.negative_prompt.is_some()),
            ("preview-prompts", self.preview_prompts.is_some()),
            ("features", self.features.is_some()),
            ("size", self.size.is_some()),
            ("float32", self.float32),
            ("merge", self.merge),
            ("tensors", self.tensors),
        ];
        refuse(&options, || {
            let folder = self.checkpoint.display();
            format!("released checkpoints: {folder} has neither text_encoder/ nor vae/")
        })
    }

    /// Refuses what a released model would not look at.
    ///
    /// # Errors
    /// Names the option.
    pub fn refuse_embedded(&self) -> Result<()> {
        let options = [
            ("data", self.data.is_some()),
            ("classifier", self.classifier.is_some()),
            ("prompts", self.prompts.is_some()),
        ];
        refuse(&options, || {
            format!("the embedded model, and {} is a released one", self.checkpoint.display())
        })
    }
}

/// Refuses the first of some options that is given, and says what they are for.
fn refuse(options: &[(&str, bool)], purpose: impl Fn() -> String) -> Result<()> {
    match options.iter().find(|(_, is_given)| *is_given) {
        Some((option, _)) => bail!("--{option} is for {}", purpose()),
        None => Ok(()),
    }
}
