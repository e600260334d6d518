//! Stand-in until the mapped reader lands.
use super::blocks::Parameters;
use super::checkpoint::read_tensors;
use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Device, Kind, Tensor};

#[derive(Debug)]
pub struct Weights(BTreeMap<String, (Vec<i64>, Tensor)>);

impl Weights {
    pub fn open(folder: &Path, stem: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let file = folder.join(format!("{stem}.safetensors"));
        let all: Parameters = if file.exists() {
            read_tensors(&file)?
        } else {
            let index: Index = read_json(&folder.join(format!("{stem}.safetensors.index.json")))?;
            let mut all = Parameters::new();
            let files: std::collections::BTreeSet<_> = index.weight_map.into_values().collect();
            for file in files {
                all.extend(read_tensors(&folder.join(file))?);
            }
            all
        };
        Ok(Self(all.into_iter().map(|(n, t)| (n, (t.size(), t))).collect()))
    }
    pub fn shapes(&self) -> impl Iterator<Item = (&str, &[i64])> {
        self.0.iter().map(|(n, (s, _))| (n.as_str(), s.as_slice()))
    }
    pub fn tensor(&self, name: &str, kind: Kind, device: Device) -> Result<Tensor> {
        let (_, t) = self.0.get(name).with_context(|| format!("{name} is missing"))?;
        Ok(t.f_to_device(device)?.f_to_kind(kind)?)
    }
}

pub fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))
}

pub fn check_shapes<'a, S: AsRef<[i64]>>(
    expected: &[(String, Vec<i64>)],
    found: impl Iterator<Item = (&'a str, S)>,
) -> Result<()> {
    let mut found: BTreeMap<&str, S> = found.collect();
    let mut faults = Vec::new();
    for (name, shape) in expected {
        match found.remove(name.as_str()) {
            None => faults.push(format!("{name} is missing")),
            Some(size) if size.as_ref() != shape => {
                faults.push(format!("{name} has shape {:?}, expected {shape:?}", size.as_ref()))
            }
            Some(_) => {}
        }
    }
    faults.extend(found.keys().map(|name| format!("{name} is unexpected")));
    ensure!(faults.is_empty(), "tensors do not fit the model: {}", faults.join("; "));
    Ok(())
}
