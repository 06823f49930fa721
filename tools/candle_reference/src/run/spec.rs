//! The JSON file that says what to run, and the files that it names.

use anyhow::{bail, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use serde_json::Value;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

pub struct Spec {
    json: Value,
    folder: PathBuf,
}

impl Spec {
    pub fn read(path: &Path) -> Result<Spec> {
        let folder = path.parent().unwrap_or(Path::new(".")).to_path_buf();
        Ok(Spec { json: read_json(path)?, folder })
    }

    pub fn get(&self, key: &str) -> Result<&Value> {
        self.json.get(key).with_context(|| format!("the spec lacks \"{key}\""))
    }

    pub fn has(&self, key: &str) -> bool {
        self.json.get(key).is_some()
    }

    pub fn path(&self, key: &str) -> Result<PathBuf> {
        self.path_of(self.get(key)?).with_context(|| format!("\"{key}\""))
    }

    pub fn path_of(&self, value: &Value) -> Result<PathBuf> {
        Ok(self.folder.join(value.as_str().context("not a path")?))
    }

    /// One path or a list of them.
    pub fn paths(&self, key: &str) -> Result<Vec<PathBuf>> {
        match self.get(key)? {
            Value::Array(list) => list.iter().map(|value| self.path_of(value)).collect(),
            one => Ok(vec![self.path_of(one).with_context(|| format!("\"{key}\""))?]),
        }
    }

    /// A configuration: an object in the spec itself, or the path of a JSON file.
    pub fn config(&self, key: &str) -> Result<Value> {
        match self.get(key)? {
            Value::Object(object) => Ok(Value::Object(object.clone())),
            _ => read_json(&self.path(key)?),
        }
    }

    pub fn number(&self, key: &str) -> Result<f64> {
        self.get(key)?.as_f64().with_context(|| format!("\"{key}\" is not a number"))
    }

    pub fn dtype(&self) -> Result<DType> {
        match self.get("dtype")?.as_str() {
            Some("f32") => Ok(DType::F32),
            Some("bf16") => Ok(DType::BF16),
            other => bail!("dtype {other:?} is neither f32 nor bf16"),
        }
    }

    /// `ENCODER_ids`, or `prompt` through `ENCODER_tokenizer`.
    pub fn ids(&self, encoder: &str) -> Result<Vec<u32>> {
        if let Some(ids) = self.json.get(format!("{encoder}_ids")) {
            return Ok(serde_json::from_value(ids.clone())?);
        }
        let path = self.path(&format!("{encoder}_tokenizer"))?;
        let tokenizer = Tokenizer::from_file(path).map_err(anyhow::Error::msg)?;
        let prompt = self.get("prompt")?.as_str().context("prompt")?;
        Ok(tokenizer.encode(prompt, true).map_err(anyhow::Error::msg)?.get_ids().to_vec())
    }

    /// Tensor `name` of the safetensors file that `key` names, as stored.
    pub fn tensor(&self, key: &str, name: &str) -> Result<Tensor> {
        let mut tensors = candle_core::safetensors::load(self.path(key)?, &Device::Cpu)?;
        tensors.remove(name).with_context(|| format!("the file of \"{key}\" has no tensor \"{name}\""))
    }
}

pub fn read_json(path: &Path) -> Result<Value> {
    Ok(serde_json::from_slice(&std::fs::read(path).with_context(|| path.display().to_string())?)?)
}

pub fn safetensors(files: &[PathBuf], dtype: DType, dev: &Device) -> Result<VarBuilder<'static>> {
    Ok(unsafe { VarBuilder::from_mmaped_safetensors(files, dtype, dev)? })
}

pub fn usize_of(config: &Value, key: &str) -> Result<usize> {
    Ok(config.get(key).and_then(Value::as_u64).with_context(|| format!("config lacks \"{key}\""))? as usize)
}

pub fn f64_of(config: &Value, key: &str) -> Result<f64> {
    config.get(key).and_then(Value::as_f64).with_context(|| format!("config lacks \"{key}\""))
}

pub fn bool_of(config: &Value, key: &str) -> Result<bool> {
    config.get(key).and_then(Value::as_bool).with_context(|| format!("config lacks \"{key}\""))
}

pub fn list_of(config: &Value, key: &str) -> Result<Vec<usize>> {
    let list = config.get(key).with_context(|| format!("config lacks \"{key}\""))?;
    serde_json::from_value(list.clone()).with_context(|| format!("\"{key}\" is no list of whole numbers"))
}
