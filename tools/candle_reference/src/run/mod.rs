//! Candle's own text-to-image over any checkpoint, recorded stage by stage.
//!
//! What to run is a JSON file: `"family": "flux"` (or none) is read by `flux.rs`, `"family": "sd"` by `sd.rs`,
//! which document their fields. Relative paths are taken from the folder of the JSON file.

mod flux;
mod sd;
mod spec;

use anyhow::{bail, Result};
use candle_core::{DType, Tensor};
use spec::Spec;
use std::collections::HashMap;
use std::path::Path;

/// Tensors by name. Names are those that `flux-sd trace` writes.
type Record = HashMap<String, Tensor>;

pub fn run(spec: &Path, out: &Path) -> Result<()> {
    let spec = Spec::read(spec)?;
    let mut record = match spec.get("family").ok().and_then(|f| f.as_str()) {
        None | Some("flux") => flux::run(&spec)?,
        Some("sd") => sd::run(&spec)?,
        Some(other) => bail!("family {other:?} is neither \"flux\" nor \"sd\""),
    };
    for tensor in record.values_mut() {
        let half = matches!(tensor.dtype(), DType::BF16 | DType::F16);
        *tensor = if half { tensor.to_dtype(DType::F32)? } else { tensor.clone() }.contiguous()?;
    }
    candle_core::safetensors::save(&record, out)?;
    println!("{}: {} tensors", out.display(), record.len());
    Ok(())
}
