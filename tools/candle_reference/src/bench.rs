//! Times full-width FLUX blocks, T5 and the autoencoder on this CPU.

use crate::cases::flux::{flux_forward, flux_inputs};
use crate::cases::gguf::flux_gguf;
use crate::cases::text::t5_config;
use crate::procedural::{input, tokens, var_builder};
use anyhow::Result;
use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::{flux, t5};
use std::time::Instant;

fn time(label: &str, n: usize, mut f: impl FnMut() -> Result<()>) -> Result<()> {
    f()?;
    let mut best = f64::MAX;
    for _ in 0..n {
        let t = Instant::now();
        f()?;
        best = best.min(t.elapsed().as_secs_f64());
    }
    println!("{label}: best of {n} {best:.3} s");
    Ok(())
}

pub fn bench() -> Result<()> {
    let dev = Device::Cpu;
    let cfg = flux::model::Config { depth: 1, depth_single_blocks: 1, ..flux::model::Config::schnell() };
    for (label, dtype) in [("f32", DType::F32), ("bf16", DType::BF16)] {
        let (vb, _) = var_builder(dtype, &dev);
        let model = flux::model::Flux::new(&cfg, vb)?;
        let i = flux_inputs(&cfg, 256, 256, 256, dtype, &dev)?;
        time(&format!("flux 1+1 blocks full width, 256+256 tokens, {label}"), 2, || {
            Ok(flux_forward(&model, &i).map(|_| ())?)
        })?;
    }
    for q in [GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4K] {
        let path = std::env::temp_dir().join("candle_bench.gguf");
        flux_gguf(&cfg, q, &path, &dev)?;
        let vb = candle_transformers::quantized_var_builder::VarBuilder::from_gguf(&path, &dev)?;
        let model = flux::quantized_model::Flux::new(&cfg, vb)?;
        let i = flux_inputs(&cfg, 256, 256, 256, DType::F32, &dev)?;
        time(&format!("flux 1+1 blocks full width, 256+256 tokens, {q:?}"), 2, || {
            Ok(flux_forward(&model, &i).map(|_| ())?)
        })?;
    }
    let (vb, _) = var_builder(DType::F32, &dev);
    let ae = flux::autoencoder::AutoEncoder::new(&flux::autoencoder::Config::dev(), vb)?;
    let z = input("input.ae_latent", &[1, 16, 32, 32], &dev)?;
    time("flux AE decode 256x256 f32", 2, || Ok(ae.decode(&z).map(|_| ())?))?;
    let cfg = t5_config(4096, 10240, 64, 2, 32128)?;
    let (vb, _) = var_builder(DType::F32, &dev);
    let mut model = t5::T5EncoderModel::load(vb, &cfg)?;
    let ids = Tensor::new(&tokens("input.t5_ids", 256, 32000)[..], &dev)?.unsqueeze(0)?;
    time("t5-xxl 2 of 24 layers, 256 tokens, f32", 2, || Ok(model.forward(&ids).map(|_| ())?))
}
