//! Procedural tensors: every weight and input is a pure function of its name, shape and index,
//! so a reference file holds outputs only and any language can rebuild the rest bit for bit.
//!
//! seed(name)   = FNV-1a 64 of the UTF-8 name
//! bits(i)      = splitmix64 finaliser of seed + (i + 1) * 0x9E3779B97F4A7C15   (wrapping)
//! u(i)         = (bits(i) >> 40) / 2^24 * 2 - 1                                  in [-1, 1)
//! value(i)     = name ends in "pos_embed"   : u(i) * sqrt(3)
//!                other rank >= 2            : u(i) * sqrt(3 / fan_in),  fan_in = product of dims[1..]
//!                name ends in "bias"        : u(i) * 0.05
//!                other rank 1 (norm scales) : 1 + u(i) * 0.1
//!                A case may multiply the values of some names (see `Weights::scale`).
//! inputs       = u(i) * sqrt(3)          token ids = bits(i) % vocab
//! All arithmetic in f64, then one rounding to f32.

use candle_core::{DType, Device, Result, Shape, Tensor};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

pub fn seed(name: &str) -> u64 {
    name.bytes().fold(0xcbf29ce484222325, |h, b| (h ^ b as u64).wrapping_mul(0x100000001b3))
}

pub fn bits(seed: u64, i: u64) -> u64 {
    let mut z = seed.wrapping_add((i + 1).wrapping_mul(0x9E3779B97F4A7C15));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58476D1CE4E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D049BB133111EB);
    z ^ (z >> 31)
}

fn u(seed: u64, i: u64) -> f64 {
    (bits(seed, i) >> 40) as f64 / (1u64 << 24) as f64 * 2.0 - 1.0
}

pub fn weight(name: &str, dims: &[usize], scale: f64) -> Vec<f32> {
    let s = seed(name);
    let n: usize = dims.iter().product();
    let (offset, gain) = if name.ends_with("pos_embed") {
        (0.0, 3f64.sqrt())
    } else if dims.len() >= 2 {
        (0.0, (3.0 / dims[1..].iter().product::<usize>() as f64).sqrt())
    } else if name.ends_with("bias") {
        (0.0, 0.05)
    } else {
        (1.0, 0.1)
    };
    (0..n as u64).map(|i| ((offset + u(s, i) * gain) * scale) as f32).collect()
}

pub fn input(name: &str, dims: &[usize], dev: &Device) -> Result<Tensor> {
    let s = seed(name);
    let n: usize = dims.iter().product();
    let v: Vec<f32> = (0..n as u64).map(|i| (u(s, i) * 3f64.sqrt()) as f32).collect();
    Tensor::from_vec(v, dims, dev)
}

pub fn tokens(name: &str, len: usize, vocab: u64) -> Vec<u32> {
    let s = seed(name);
    (0..len as u64).map(|i| (bits(s, i) % vocab) as u32).collect()
}

/// Records each (name, shape) that a model asks for: Candle's own key list of that model.
pub type Keys = Arc<Mutex<BTreeMap<String, Vec<usize>>>>;

/// What a case changes about the procedural weights.
#[derive(Clone, Copy)]
pub struct Weights {
    /// Factor on the values of a name, 1 for most.
    pub scale: fn(&str) -> f64,
    /// Optional tensors that the checkpoint is to lack, by a part of their name.
    pub absent: &'static [&'static str],
}

impl Default for Weights {
    fn default() -> Self {
        Weights { scale: |_| 1.0, absent: &[] }
    }
}

struct Procedural {
    keys: Keys,
    weights: Weights,
}

impl candle_nn::var_builder::SimpleBackend for Procedural {
    fn get(&self, s: Shape, name: &str, _: candle_nn::Init, dtype: DType, dev: &Device) -> Result<Tensor> {
        self.keys.lock().unwrap().insert(name.to_string(), s.dims().to_vec());
        Tensor::from_vec(weight(name, s.dims(), (self.weights.scale)(name)), s, dev)?.to_dtype(dtype)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        candle_core::bail!("shape of {name} unknown")
    }

    fn contains_tensor(&self, name: &str) -> bool {
        !self.weights.absent.iter().any(|part| name.contains(part))
    }
}

pub fn var_builder_with(
    weights: Weights,
    dtype: DType,
    dev: &Device,
) -> (candle_nn::VarBuilder<'static>, Keys) {
    let keys = Keys::default();
    let backend = Box::new(Procedural { keys: keys.clone(), weights });
    (candle_nn::VarBuilder::from_backend(backend, dtype, dev.clone()), keys)
}

pub fn var_builder(dtype: DType, dev: &Device) -> (candle_nn::VarBuilder<'static>, Keys) {
    var_builder_with(Weights::default(), dtype, dev)
}
