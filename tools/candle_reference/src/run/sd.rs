//! Stable Diffusion text-to-image over the files of a diffusers repository. The spec:
//!
//! {
//!   "family": "sd",
//!   "unet": "unet/diffusion_pytorch_model.safetensors", "unet_config": "unet/config.json",
//!   "vae": "vae/diffusion_pytorch_model.safetensors",   "vae_config": "vae/config.json",
//!   "hidden": "hidden.safetensors"      (tensor "hidden" (1, L, C); with guidance also "negative" (1, L, C))
//!     or "encoders": [{ "config": "sd15", "sd21", "sdxl" or "sdxl2", "weights": "model.safetensors",
//!                       "ids": [...], "negative_ids": [...] }, ...]   (outputs are joined along the channels)
//!   "scheduler": { "kind": "ddim" or "euler_a", "prediction": "epsilon" or "v",
//!                  "spacing": "leading", "trailing" or "linspace" },
//!   "steps": 20, "guidance": 7.5, "dtype": "f32",   (Candle's CPU backend has no convolution in bfloat16)
//!   "latents": "noise.safetensors"      (tensor "latents" (1, 4, height / 8, width / 8), float32, unit variance)
//!   "condition": "mask.safetensors"     (inpainting models: tensor "condition" (1, 5, height / 8, width / 8))
//! }
//!
//! Candle's CLIP configurations are closed: another encoder's hidden states are given as "hidden". Guidance above 1
//! runs negative and positive text as a batch of two, negative first. What Candle leaves out is left out here:
//! SDXL's pooled text and sizes, the penultimate layer. Its Euler ancestral draws noise that no seed can set; what
//! it drew is in the record, as the part of step.N+1.latents that step.N.latents and step.N.noise_pred do not give.

use super::spec::{bool_of, f64_of, list_of, safetensors, usize_of, Spec};
use super::Record;
use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device, Module, Tensor};
use candle_transformers::models::stable_diffusion as sd;
use sd::schedulers::{PredictionType, Scheduler, SchedulerConfig, TimestepSpacing};
use serde_json::Value;

pub fn run(spec: &Spec) -> Result<Record> {
    let dtype = spec.dtype()?;
    ensure!(
        dtype == DType::F32,
        "Candle's CPU backend has no convolution in bfloat16: give \"dtype\": \"f32\""
    );
    let mut record = Record::new();
    let guidance = spec.number("guidance")?;
    let hidden = hidden_states(spec, dtype, guidance > 1.0, &mut record)?;
    record.insert("hidden".into(), hidden.clone());
    let latents = denoise(spec, dtype, &hidden, guidance, &mut record)?;
    let (config, scale) = vae_config(&spec.config("vae_config")?)?;
    let weights = safetensors(&spec.paths("vae")?, dtype, &Device::Cpu)?;
    let image = sd::vae::AutoEncoderKL::new(weights, 3, 3, config)?.decode(&(&latents / scale)?)?;
    let pixels = (((&image / 2.)? + 0.5)?.clamp(0f32, 1f32)? * 255.)?.to_dtype(DType::U8)?;
    record.extend([("latents".into(), latents), ("image".into(), image), ("pixels".into(), pixels)]);
    Ok(record)
}

/// (1 or 2, L, C): with guidance the negative prompt's states stand first.
fn hidden_states(spec: &Spec, dtype: DType, guided: bool, record: &mut Record) -> Result<Tensor> {
    if spec.has("hidden") {
        ensure!(!spec.has("encoders"), "give \"hidden\" or \"encoders\", not both");
        let positive = spec.tensor("hidden", "hidden")?.to_dtype(dtype)?;
        if !guided {
            return Ok(positive);
        }
        let negative = spec.tensor("hidden", "negative")?.to_dtype(dtype)?;
        return Ok(Tensor::cat(&[negative, positive], 0)?);
    }
    let encoders = spec.get("encoders")?.as_array().context("\"encoders\" is no list")?;
    let mut parts = Vec::new();
    for (i, encoder) in encoders.iter().enumerate() {
        let (ids, hidden) = encode(spec, encoder, dtype, guided)?;
        record.insert(if i == 0 { "ids".into() } else { format!("ids_{}", i + 1) }, ids);
        parts.push(hidden);
    }
    Ok(Tensor::cat(&parts, 2)?)
}

fn encode(spec: &Spec, encoder: &Value, dtype: DType, guided: bool) -> Result<(Tensor, Tensor)> {
    let config = match encoder.get("config").and_then(Value::as_str) {
        Some("sd15") => sd::clip::Config::v1_5(),
        Some("sd21") => sd::clip::Config::v2_1(),
        Some("sdxl") => sd::clip::Config::sdxl(),
        Some("sdxl2") => sd::clip::Config::sdxl2(),
        other => bail!("encoder config {other:?} is none of sd15, sd21, sdxl, sdxl2"),
    };
    let row = |key: &str| -> Result<Tensor> {
        let ids: Vec<u32> =
            serde_json::from_value(encoder.get(key).context(format!("an encoder lacks {key}"))?.clone())?;
        Ok(Tensor::new(&ids[..], &Device::Cpu)?.unsqueeze(0)?)
    };
    let ids = if guided { Tensor::cat(&[row("negative_ids")?, row("ids")?], 0)? } else { row("ids")? };
    let file = spec.path_of(encoder.get("weights").context("an encoder lacks weights")?)?;
    // Candle's own programs run CLIP in float32 and cast what comes out.
    let model = sd::clip::ClipTextTransformer::new(safetensors(&[file], DType::F32, &Device::Cpu)?, &config)?;
    // One prompt at a time: its causal mask does not broadcast over a batch.
    let rows = (0..ids.dim(0)?)
        .map(|i| model.forward(&ids.narrow(0, i, 1)?))
        .collect::<candle_core::Result<Vec<_>>>()?;
    Ok((ids, Tensor::cat(&rows, 0)?.to_dtype(dtype)?))
}

fn denoise(spec: &Spec, dtype: DType, hidden: &Tensor, guidance: f64, record: &mut Record) -> Result<Tensor> {
    let dev = Device::Cpu;
    let guided = guidance > 1.0;
    let json = spec.config("unet_config")?;
    let (config, channels) = unet_config(&json)?;
    let weights = safetensors(&spec.paths("unet")?, dtype, &dev)?;
    let unet = sd::unet_2d::UNet2DConditionModel::new(weights, channels, 4, false, config)?;
    let mut scheduler = scheduler(spec)?;
    let condition = match spec.has("condition") {
        true => Some(spec.tensor("condition", "condition")?.to_dtype(dtype)?),
        false => None,
    };
    let noise = spec.tensor("latents", "latents")?;
    let timesteps = scheduler.timesteps().to_vec();
    let mut latents = (noise.clone() * scheduler.init_noise_sigma())?.to_dtype(dtype)?;
    let twice =
        |x: &Tensor| -> Result<Tensor> { Ok(if guided { Tensor::cat(&[x, x], 0)? } else { x.clone() }) };
    for (i, &t) in timesteps.iter().enumerate() {
        let mut input = scheduler.scale_model_input(twice(&latents)?, t)?;
        if let Some(condition) = &condition {
            input = Tensor::cat(&[input, twice(condition)?], 1)?;
        }
        let mut noise_pred = unet.forward(&input, t as f64, hidden)?;
        if guided {
            let halves = noise_pred.chunk(2, 0)?;
            noise_pred = (&halves[0] + ((&halves[1] - &halves[0])? * guidance)?)?;
        }
        record.insert(format!("step.{i}.latents"), latents.clone());
        latents = scheduler.step(&noise_pred, t, &latents)?;
        record.insert(format!("step.{i}.noise_pred"), noise_pred);
    }
    let timesteps: Vec<f64> = timesteps.iter().map(|&t| t as f64).collect();
    record.extend([("noise".into(), noise), ("timesteps".into(), Tensor::new(&timesteps[..], &dev)?)]);
    Ok(latents)
}

fn scheduler(spec: &Spec) -> Result<Box<dyn Scheduler>> {
    let json = spec.config("scheduler")?;
    let word = |key: &str| {
        json.get(key).and_then(Value::as_str).with_context(|| format!("scheduler lacks \"{key}\""))
    };
    let prediction_type = match word("prediction")? {
        "epsilon" => PredictionType::Epsilon,
        "v" => PredictionType::VPrediction,
        other => bail!("prediction {other:?} is neither epsilon nor v"),
    };
    let timestep_spacing = match word("spacing")? {
        "leading" => TimestepSpacing::Leading,
        "trailing" => TimestepSpacing::Trailing,
        "linspace" => TimestepSpacing::Linspace,
        other => bail!("spacing {other:?} is none of leading, trailing, linspace"),
    };
    let steps = spec.number("steps")? as usize;
    match word("kind")? {
        "ddim" => {
            let config =
                sd::ddim::DDIMSchedulerConfig { prediction_type, timestep_spacing, ..Default::default() };
            Ok(config.build(steps)?)
        }
        "euler_a" => {
            use sd::euler_ancestral_discrete::EulerAncestralDiscreteSchedulerConfig as Config;
            Ok(Config { prediction_type, timestep_spacing, ..Default::default() }.build(steps)?)
        }
        other => bail!("scheduler {other:?} is neither ddim nor euler_a"),
    }
}

/// Candle's configuration and the input channels, from diffusers' unet/config.json.
fn unet_config(c: &Value) -> Result<(sd::unet_2d::UNet2DConditionModelConfig, usize)> {
    let channels = list_of(c, "block_out_channels")?;
    let per_block = |key: &str| -> Result<Vec<usize>> {
        match c.get(key) {
            Some(Value::Array(_)) => list_of(c, key),
            _ => Ok(vec![usize_of(c, key)?; channels.len()]),
        }
    };
    let heads = per_block("attention_head_dim")?; // diffusers' name for what is a number of heads
    let depths = per_block("transformer_layers_per_block").unwrap_or(vec![1; channels.len()]);
    let types: Vec<String> =
        serde_json::from_value(c.get("down_block_types").context("down_block_types")?.clone())?;
    ensure!(
        types.len() == channels.len() && heads.len() == channels.len(),
        "unet config: lists of different lengths"
    );
    let blocks = (0..channels.len())
        .map(|i| sd::unet_2d::BlockConfig {
            out_channels: channels[i],
            use_cross_attn: types[i].starts_with("CrossAttn").then_some(depths[i]),
            attention_head_dim: heads[i],
        })
        .collect();
    let config = sd::unet_2d::UNet2DConditionModelConfig {
        blocks,
        center_input_sample: false,
        cross_attention_dim: usize_of(c, "cross_attention_dim")?,
        downsample_padding: 1,
        flip_sin_to_cos: true,
        freq_shift: 0.,
        layers_per_block: usize_of(c, "layers_per_block")?,
        mid_block_scale_factor: 1.,
        norm_eps: f64_of(c, "norm_eps")?,
        norm_num_groups: usize_of(c, "norm_num_groups")?,
        sliced_attention_size: None,
        use_linear_projection: bool_of(c, "use_linear_projection").unwrap_or(false),
    };
    Ok((config, usize_of(c, "in_channels")?))
}

/// Candle's configuration and the factor of the latents, from diffusers' vae/config.json.
fn vae_config(c: &Value) -> Result<(sd::vae::AutoEncoderKLConfig, f64)> {
    let config = sd::vae::AutoEncoderKLConfig {
        block_out_channels: list_of(c, "block_out_channels")?,
        layers_per_block: usize_of(c, "layers_per_block")?,
        latent_channels: usize_of(c, "latent_channels")?,
        norm_num_groups: usize_of(c, "norm_num_groups")?,
        use_quant_conv: bool_of(c, "use_quant_conv").unwrap_or(true),
        use_post_quant_conv: bool_of(c, "use_post_quant_conv").unwrap_or(true),
    };
    Ok((config, f64_of(c, "scaling_factor").unwrap_or(0.18215)))
}
