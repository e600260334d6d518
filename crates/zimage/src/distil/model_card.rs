//! The README beside a student, in the form that model hubs read.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use decoupled_dmd::Transition;
use tch_training::files::write_atomically;

use crate::distil::picture_size::PictureSize;
use crate::distil::recipe::Recipe;
use crate::distil::saved_student::ADAPTER;

/// Writes `README.md`: how the student was made, at these `sizes` of pictures, and how to use it, at the first.
///
/// # Errors
/// If the file cannot be written.
pub fn write_model_card(
    folder: &Path,
    base: &Path,
    sizes: &[PictureSize],
    recipe: &Recipe,
) -> Result<()> {
    ensure!(!sizes.is_empty(), "a student was made at some size");
    let PictureSize { width, height } = sizes[0];
    let sizes = sizes.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let name = base.file_name().map_or("Z-Image".into(), |name| name.to_string_lossy());
    let steps = recipe.steps;
    let load = match recipe.adapter {
        Some(_) => {
            format!("pipe.load_lora_weights(\"path/to/this/folder\", weight_name=\"{ADAPTER}\")")
        }
        None => "pipe.transformer = ZImageTransformer2DModel.from_pretrained(\n    \
                 \"path/to/this/folder\", subfolder=\"transformer\", torch_dtype=torch.bfloat16\n)"
            .to_owned(),
    };
    let imports = if recipe.adapter.is_some() { "" } else { ", ZImageTransformer2DModel" };
    let text = format!(
        "---\nlibrary_name: diffusers\npipeline_tag: text-to-image\ntags: [decoupled-dmd, {kind}]\n---\n\n\
# {name}, {steps} steps\n\n\
A student of {name} that draws in {steps} steps without guidance, distilled by Decoupled DMD\n\
(arXiv 2511.22677) with the crate decoupled-dmd at {sizes} pixels.\n\n\
```python\nimport torch\nfrom diffusers import ZImagePipeline{imports}\n\n\
pipe = ZImagePipeline.from_pretrained(\"path/to/{name}\", torch_dtype=torch.bfloat16).to(\"cuda\")\n{load}\n\
image = pipe(\n    \"a cat\", height={height}, width={width}, num_inference_steps={steps}, guidance_scale=0\n).images[0]\n```\n\n\
`num_inference_steps` is {steps} from diffusers 0.39 on and {more} before, where the last step had no length.\n\
The scheduler is that of the base model, shift {shift}: the grid that the student was trained on.\n{transition}\n\
## Recipe\n\n```json\n{json}\n```\n",
        kind = if recipe.adapter.is_some() { "lora" } else { "distillation" },
        more = steps + 1,
        shift = recipe.shift.get(),
        transition = match recipe.transition {
            Transition::Ddim => "",
            Transition::Renoise =>
                "It was trained with fresh noise between steps, which this pipeline does not add: pictures\n\
                 will differ from those of the training.\n",
        },
        json = serde_json::to_string_pretty(recipe)?,
    );
    Ok(write_atomically(&folder.join("README.md"), |path| fs::write(path, text))?)
}
