//! FLUX text-to-image. The spec:
//!
//! {
//!   "transformer": "flux1.safetensors" or "flux1.gguf",
//!   "transformer_config": { "in_channels": 64, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072,
//!       "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38, "axes_dim": [16, 56, 56],
//!       "theta": 10000, "qkv_bias": true, "guidance_embed": false },
//!   "t5": ["t5.safetensors"],     "t5_config": "config.json",   "t5_tokenizer": "tokenizer.json" or "t5_ids": [...],
//!   "clip": ["clip.safetensors"], "clip_config": "config.json", "clip_tokenizer": "tokenizer.json" or "clip_ids": [...],
//!   "ae": "ae.safetensors",       "ae_config": { "resolution": 256, "in_channels": 3, "ch": 128, "out_ch": 3,
//!       "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 16, "scale_factor": 0.3611, "shift_factor": 0.1159 },
//!   "prompt": "a cat", "t5_length": 256, "height": 128, "width": 128, "steps": 4, "guidance": 3.5,
//!   "shift": null or [0.5, 1.15], "dtype": "f32" or "bf16",
//!   "latents": "noise.safetensors"      (tensor "latents", (1, 16, height / 8, width / 8), float32)
//! }
//!
//! Tensors have the authors' names (BFL's for transformer and autoencoder). Config fields are those of Candle's
//! structs; CLIP's and T5's are Hugging Face config.json files. In bf16 the autoencoder runs in float32 all the
//! same, because Candle's CPU backend has no convolution in bfloat16.

use super::spec::{bool_of, f64_of, list_of, safetensors, usize_of, Spec};
use super::Record;
use anyhow::{Context, Result};
use candle_core::{DType, Device, Module, Tensor};
use candle_transformers::models::flux::{self, WithForward};
use candle_transformers::models::{clip, t5};
use candle_transformers::quantized_var_builder;
use serde_json::Value;
use std::cell::RefCell;

pub fn run(spec: &Spec) -> Result<Record> {
    let dtype = spec.dtype()?;
    let mut record = Record::new();
    let txt = encode_t5(spec, dtype, &mut record)?;
    let vec = encode_clip(spec, dtype, &mut record)?;
    let latents = denoise(spec, dtype, &txt, &vec, &mut record)?;
    let config = autoencoder_config(&spec.config("ae_config")?)?;
    // In float32 always: Candle's CPU backend has no convolution in bfloat16.
    let weights = safetensors(&spec.paths("ae")?, DType::F32, &Device::Cpu)?;
    let latents = latents.to_dtype(DType::F32)?;
    let image = flux::autoencoder::AutoEncoder::new(&config, weights)?.decode(&latents)?;
    let pixels = ((image.clamp(-1f32, 1f32)? + 1.0)? * 127.5)?.to_dtype(DType::U8)?;
    record.extend([("image".into(), image), ("pixels".into(), pixels)]);
    Ok(record)
}

fn encode_t5(spec: &Spec, dtype: DType, record: &mut Record) -> Result<Tensor> {
    let dev = Device::Cpu;
    let mut ids = spec.ids("t5")?;
    ids.resize(spec.number("t5_length")? as usize, 0);
    let ids = Tensor::new(&ids[..], &dev)?.unsqueeze(0)?;
    let config: t5::Config = serde_json::from_value(spec.config("t5_config")?)?;
    let weights = safetensors(&spec.paths("t5")?, dtype, &dev)?;
    let txt = t5::T5EncoderModel::load(weights, &config)?.forward(&ids)?;
    record.extend([("t5.ids".into(), ids), ("t5.hidden".into(), txt.clone())]);
    Ok(txt)
}

fn encode_clip(spec: &Spec, dtype: DType, record: &mut Record) -> Result<Tensor> {
    let dev = Device::Cpu;
    let ids = Tensor::new(&spec.ids("clip")?[..], &dev)?.unsqueeze(0)?;
    let json = spec.config("clip_config")?;
    let c = json.get("text_config").unwrap_or(&json);
    let config = clip::text_model::ClipTextConfig {
        vocab_size: usize_of(c, "vocab_size")?,
        projection_dim: usize_of(c, "hidden_size")?,
        embed_dim: usize_of(c, "hidden_size")?,
        activation: clip::text_model::Activation::QuickGelu,
        intermediate_size: usize_of(c, "intermediate_size")?,
        max_position_embeddings: usize_of(c, "max_position_embeddings")?,
        pad_with: None,
        num_hidden_layers: usize_of(c, "num_hidden_layers")?,
        num_attention_heads: usize_of(c, "num_attention_heads")?,
    };
    let weights = safetensors(&spec.paths("clip")?, dtype, &dev)?;
    let prefixed = weights.contains_tensor("text_model.final_layer_norm.weight");
    let weights = if prefixed { weights.pp("text_model") } else { weights };
    let vec = clip::text_model::ClipTextTransformer::new(weights, &config)?.forward(&ids)?;
    record.extend([("clip.ids".into(), ids), ("clip.pooled".into(), vec.clone())]);
    Ok(vec)
}

fn denoise(spec: &Spec, dtype: DType, txt: &Tensor, vec: &Tensor, record: &mut Record) -> Result<Tensor> {
    let dev = Device::Cpu;
    let (height, width) = (spec.number("height")? as usize, spec.number("width")? as usize);
    let noise = spec.tensor("latents", "latents")?;
    let file = spec.path("transformer")?;
    let gguf = file.extension().is_some_and(|e| e == "gguf");
    let work = if gguf { DType::F32 } else { dtype };
    let start = noise.to_dtype(dtype)?.to_dtype(work)?;
    let s = flux::sampling::State::new(&txt.to_dtype(work)?, &vec.to_dtype(work)?, &start)?;
    let shift: Option<(f64, f64)> = serde_json::from_value(spec.get("shift")?.clone())?;
    let tokens = s.img.dim(1)?;
    let shift = shift.map(|(base, max)| (tokens, base, max));
    let times = flux::sampling::get_schedule(spec.number("steps")? as usize, shift);

    let config = transformer_config(&spec.config("transformer_config")?)?;
    let model: Box<dyn WithForward> = if gguf {
        let weights = quantized_var_builder::VarBuilder::from_gguf(&file, &dev)?;
        Box::new(flux::quantized_model::Flux::new(&config, weights)?)
    } else {
        Box::new(flux::model::Flux::new(&config, safetensors(&[file], dtype, &dev)?)?)
    };
    let model = Recorder { model, seen: RefCell::default() };
    let guidance = spec.number("guidance")?;
    let img =
        flux::sampling::denoise(&model, &s.img, &s.img_ids, &s.txt, &s.txt_ids, &s.vec, &times, guidance)?;
    for (i, (latents, velocity)) in model.seen.into_inner().into_iter().enumerate() {
        record.insert(format!("step.{i}.latents"), latents);
        record.insert(format!("step.{i}.velocity"), velocity);
    }
    let latents = flux::sampling::unpack(&img.to_dtype(dtype)?, height, width)?;
    record.extend([
        ("noise".into(), noise),
        ("packed".into(), s.img.clone()),
        ("timesteps".into(), Tensor::new(&times[..], &dev)?),
        ("latents".into(), latents.clone()),
    ]);
    Ok(latents)
}

fn transformer_config(c: &Value) -> Result<flux::model::Config> {
    Ok(flux::model::Config {
        in_channels: usize_of(c, "in_channels")?,
        vec_in_dim: usize_of(c, "vec_in_dim")?,
        context_in_dim: usize_of(c, "context_in_dim")?,
        hidden_size: usize_of(c, "hidden_size")?,
        mlp_ratio: f64_of(c, "mlp_ratio")?,
        num_heads: usize_of(c, "num_heads")?,
        depth: usize_of(c, "depth")?,
        depth_single_blocks: usize_of(c, "depth_single_blocks")?,
        axes_dim: list_of(c, "axes_dim")?,
        theta: usize_of(c, "theta")?,
        qkv_bias: bool_of(c, "qkv_bias")?,
        guidance_embed: bool_of(c, "guidance_embed")?,
    })
}

fn autoencoder_config(c: &Value) -> Result<flux::autoencoder::Config> {
    Ok(flux::autoencoder::Config {
        resolution: usize_of(c, "resolution").context("ae_config")?,
        in_channels: usize_of(c, "in_channels")?,
        ch: usize_of(c, "ch")?,
        out_ch: usize_of(c, "out_ch")?,
        ch_mult: list_of(c, "ch_mult")?,
        num_res_blocks: usize_of(c, "num_res_blocks")?,
        z_channels: usize_of(c, "z_channels")?,
        scale_factor: f64_of(c, "scale_factor")?,
        shift_factor: f64_of(c, "shift_factor")?,
    })
}

/// Passes every call on to the model and keeps the latents it was given and what it answered.
struct Recorder {
    model: Box<dyn WithForward>,
    seen: RefCell<Vec<(Tensor, Tensor)>>,
}

impl WithForward for Recorder {
    fn forward(
        &self,
        img: &Tensor,
        img_ids: &Tensor,
        txt: &Tensor,
        txt_ids: &Tensor,
        t: &Tensor,
        y: &Tensor,
        guidance: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        let velocity = self.model.forward(img, img_ids, txt, txt_ids, t, y, guidance)?;
        self.seen.borrow_mut().push((img.clone(), velocity.clone()));
        Ok(velocity)
    }
}
