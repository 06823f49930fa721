//! GGML block types, products with quantised weights, and quantised FLUX.

use super::flux::{flux_forward, flux_inputs, flux_tiny};
use crate::dump::Dump;
use crate::procedural::{input, var_builder, weight};
use anyhow::Result;
use candle_core::quantized::{gguf_file, GgmlDType, QTensor};
use candle_core::{DType, Device, Module, Tensor};
use candle_transformers::models::flux;
use std::path::Path;

const QUANTS: [GgmlDType; 13] = [
    GgmlDType::F32,
    GgmlDType::F16,
    GgmlDType::BF16,
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
];

pub fn flux_gguf(cfg: &flux::model::Config, quant: GgmlDType, path: &Path, dev: &Device) -> Result<()> {
    let (vb, keys) = var_builder(DType::F32, dev);
    flux::model::Flux::new(cfg, vb)?;
    let keys = keys.lock().unwrap().clone();
    let mut tensors = Vec::new();
    for (name, dims) in keys.iter() {
        let t = Tensor::from_vec(weight(name, dims, 1.0), dims.clone(), dev)?;
        let fits = dims.len() == 2 && dims[1] % quant.block_size() == 0;
        tensors.push((name.clone(), QTensor::quantize(&t, if fits { quant } else { GgmlDType::F32 })?));
    }
    let refs: Vec<(&str, &QTensor)> = tensors.iter().map(|(n, t)| (n.as_str(), t)).collect();
    gguf_file::write(&mut std::fs::File::create(path)?, &[], &refs)?;
    Ok(())
}

/// Candle's CPU products round activations to 8 bits too; with this it decodes the weights and multiplies in f32.
/// It reads the variable once a thread, so the work gets a thread of its own.
fn with_decoded_weights<T: Send>(f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::env::set_var("CANDLE_DEQUANTIZE_ALL", "1");
    let result = std::thread::scope(|s| s.spawn(f).join().unwrap());
    std::env::remove_var("CANDLE_DEQUANTIZE_ALL");
    result
}

/// Rows: three of unit variance, zeros, all positive, tiny, one outlier.
fn gguf_rows(columns: usize, dev: &Device) -> Result<Tensor> {
    let x = input("input.gguf_rows", &[7, columns], dev)?;
    let mut rows = x.to_vec2::<f32>()?;
    rows[3].fill(0.0);
    for v in rows[4].iter_mut() {
        *v = v.abs() + 0.5;
    }
    for v in rows[5].iter_mut() {
        *v *= 1e-6;
    }
    rows[6][columns / 3] = 1000.0;
    Ok(Tensor::new(rows, dev)?)
}

pub fn gguf(dump: &Dump) -> Result<()> {
    dump.case("gguf_blocks", |dev, out| {
        let x = gguf_rows(512, dev)?;
        for q in QUANTS {
            let qt = QTensor::quantize(&x, q)?;
            let raw = qt.data()?.to_vec();
            let n = raw.len();
            out.insert(format!("{q:?}.blocks"), Tensor::from_vec(raw, n, dev)?);
            out.insert(format!("{q:?}.dequantized"), qt.dequantize(dev)?);
        }
        Ok(None)
    })?;
    dump.case("gguf_products", |dev, out| {
        let w = (input("input.gguf_weight", &[48, 512], dev)? * 0.05)?;
        let x = input("input.gguf_activations", &[5, 512], dev)?;
        for q in QUANTS {
            let qt = std::sync::Arc::new(QTensor::quantize(&w, q)?);
            let raw = qt.data()?.to_vec();
            let n = raw.len();
            out.insert(format!("{q:?}.blocks"), Tensor::from_vec(raw, n, dev)?);
            let product = |x: &Tensor| -> Result<Tensor> {
                Ok(candle_core::quantized::QMatMul::from_arc(qt.clone())?.forward(x)?)
            };
            out.insert(format!("{q:?}.rounded"), product(&x)?);
            out.insert(format!("{q:?}.decoded"), with_decoded_weights(|| product(&x))?);
        }
        Ok(None)
    })?;
    for q in [GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4K, GgmlDType::Q5K, GgmlDType::Q6K] {
        // hidden 256 so that every linear input is a multiple of the 256-wide K blocks; a narrow MLP keeps the files small
        let name = format!("flux_gguf_{q:?}").to_lowercase();
        dump.case(&name, |dev, out| {
            let cfg = flux::model::Config {
                hidden_size: 256,
                num_heads: 4,
                context_in_dim: 256,
                vec_in_dim: 256,
                mlp_ratio: 1.0,
                ..flux_tiny(1, 1, true)
            };
            let path = dump.dir.join(format!("{name}.gguf"));
            flux_gguf(&cfg, q, &path, dev)?;
            let forward = || -> Result<Tensor> {
                let vb = candle_transformers::quantized_var_builder::VarBuilder::from_gguf(&path, dev)?;
                let model = flux::quantized_model::Flux::new(&cfg, vb)?;
                Ok(flux_forward(&model, &flux_inputs(&cfg, 64, 96, 12, DType::F32, dev)?)?)
            };
            out.insert("velocity_rounded".into(), forward()?);
            out.insert("velocity_decoded".into(), with_decoded_weights(forward)?);
            Ok(None)
        })?;
    }
    Ok(())
}
