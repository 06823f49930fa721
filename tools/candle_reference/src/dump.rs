//! One case, one file: what a case computes goes to `NAME.safetensors`, and the names and shapes that Candle's
//! model asked for to `NAME.keys.json`.

use crate::procedural::Keys;
use anyhow::Result;
use candle_core::{Device, Tensor};
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Instant;

pub type Outputs = HashMap<String, Tensor>;

pub struct Dump {
    pub dir: PathBuf,
    /// Cases whose name does not start with it are left out.
    pub prefix: String,
    pub dev: Device,
}

impl Dump {
    /// Runs `f` where the prefix asks for it. It fills in the outputs and returns the keys, or None where
    /// another case has them already.
    pub fn case(
        &self,
        name: &str,
        f: impl FnOnce(&Device, &mut Outputs) -> Result<Option<Keys>>,
    ) -> Result<()> {
        if !name.starts_with(&self.prefix) {
            return Ok(());
        }
        let t = Instant::now();
        let mut out = Outputs::new();
        let keys = f(&self.dev, &mut out)?;
        for v in out.values_mut() {
            *v = v.contiguous()?;
        }
        candle_core::safetensors::save(&out, self.dir.join(format!("{name}.safetensors")))?;
        if let Some(keys) = keys {
            let keys = keys.lock().unwrap();
            std::fs::write(
                self.dir.join(format!("{name}.keys.json")),
                serde_json::to_string_pretty(&*keys)?,
            )?;
        }
        println!("{name}: {} tensors in {:.1?}", out.len(), t.elapsed());
        Ok(())
    }
}
