//! The FLUX transformer and its sampling.

use crate::dump::Dump;
use crate::procedural::{input, var_builder, var_builder_with, Weights};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::flux::{self, WithForward};

pub fn flux_tiny(depth: usize, single: usize, guidance: bool) -> flux::model::Config {
    flux::model::Config {
        in_channels: 64,
        vec_in_dim: 64,
        context_in_dim: 64,
        hidden_size: 128,
        mlp_ratio: 4.0,
        num_heads: 2,
        depth,
        depth_single_blocks: single,
        axes_dim: vec![16, 24, 24],
        theta: 10_000,
        qkv_bias: true,
        guidance_embed: guidance,
    }
}

pub struct FluxInputs {
    state: flux::sampling::State,
    t: Tensor,
    guidance: Tensor,
}

pub fn flux_inputs(
    cfg: &flux::model::Config,
    h: usize,
    w: usize,
    txt_len: usize,
    dtype: DType,
    dev: &Device,
) -> Result<FluxInputs> {
    let img = input("input.latent", &[1, 16, h / 8, w / 8], dev)?.to_dtype(dtype)?;
    let txt = input("input.t5", &[1, txt_len, cfg.context_in_dim], dev)?.to_dtype(dtype)?;
    let vec = input("input.clip", &[1, cfg.vec_in_dim], dev)?.to_dtype(dtype)?;
    Ok(FluxInputs {
        state: flux::sampling::State::new(&txt, &vec, &img)?,
        t: Tensor::new(&[0.75f32], dev)?,
        guidance: Tensor::new(&[3.5f32], dev)?,
    })
}

pub fn flux_forward<M: WithForward>(m: &M, i: &FluxInputs) -> candle_core::Result<Tensor> {
    let s = &i.state;
    m.forward(&s.img, &s.img_ids, &s.txt, &s.txt_ids, &i.t, &s.vec, Some(&i.guidance))
}

/// Half of the latents plus the time: every step shows what the loop passes on and how it rounds.
struct StandIn;

impl WithForward for StandIn {
    fn forward(
        &self,
        img: &Tensor,
        _img_ids: &Tensor,
        _txt: &Tensor,
        _txt_ids: &Tensor,
        timesteps: &Tensor,
        _y: &Tensor,
        _guidance: Option<&Tensor>,
    ) -> candle_core::Result<Tensor> {
        (img * 0.5)?.broadcast_add(&timesteps.to_dtype(img.dtype())?)
    }
}

/// The denoising loop by itself, in either dtype, over dev's schedule at 1024 px.
pub fn flux_euler(dump: &Dump) -> Result<()> {
    dump.case("flux_euler", |dev, out| {
        let times = flux::sampling::get_schedule(8, Some((4096, 0.5, 1.15)));
        for (name, dtype) in [("float32", DType::F32), ("bfloat16", DType::BF16)] {
            let s = flux_inputs(&flux_tiny(0, 0, true), 64, 96, 12, dtype, dev)?.state;
            let x = flux::sampling::denoise(
                &StandIn, &s.img, &s.img_ids, &s.txt, &s.txt_ids, &s.vec, &times, 3.5,
            )?;
            out.insert(name.into(), x.to_dtype(DType::F32)?);
        }
        Ok(None)
    })
}

pub fn flux_transformer(dump: &Dump) -> Result<()> {
    // Prefix models share weights, so the first prefix that differs names the block at fault.
    for (depth, single) in [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2)] {
        for (variant, guidance) in [("schnell", false), ("dev", true)] {
            dump.case(&format!("flux_tiny_{variant}_{depth}_{single}"), |dev, out| {
                let cfg = flux_tiny(depth, single, guidance);
                let (vb, keys) = var_builder(DType::F32, dev);
                let model = flux::model::Flux::new(&cfg, vb)?;
                let i = flux_inputs(&cfg, 64, 96, 12, DType::F32, dev)?;
                out.insert("velocity".into(), flux_forward(&model, &i)?);
                Ok(Some(keys))
            })?;
        }
    }
    // Positions up to 127, where the rotary table's dtype shows.
    for (name, dtype, h, w) in [
        ("flux_tiny_dev_2_2_bf16", DType::BF16, 64, 96),
        ("flux_tiny_dev_2_2_wide", DType::F32, 32, 2048),
        ("flux_tiny_dev_2_2_wide_bf16", DType::BF16, 32, 2048),
    ] {
        dump.case(name, |dev, out| {
            let cfg = flux_tiny(2, 2, true);
            let (vb, _) = var_builder(dtype, dev);
            let model = flux::model::Flux::new(&cfg, vb)?;
            let i = flux_inputs(&cfg, h, w, 12, dtype, dev)?;
            out.insert("velocity".into(), flux_forward(&model, &i)?.to_dtype(DType::F32)?);
            Ok(None)
        })?;
    }
    // Small activations before each norm, so that a wrong epsilon moves the output by a thousandth.
    dump.case("flux_tiny_dev_2_2_small", |dev, out| {
        let cfg = flux_tiny(2, 2, true);
        let scale = |name: &str| {
            if name.starts_with("img_in.") || name.starts_with("txt_in.") || name.contains("_attn.qkv.") {
                0.03
            } else if name.contains("_attn.proj.weight") {
                30.0
            } else {
                1.0
            }
        };
        let (vb, _) = var_builder_with(Weights { scale, ..Default::default() }, DType::F32, dev);
        let model = flux::model::Flux::new(&cfg, vb)?;
        let i = flux_inputs(&cfg, 64, 96, 12, DType::F32, dev)?;
        out.insert("velocity".into(), flux_forward(&model, &i)?);
        Ok(None)
    })?;
    dump.case("flux_full_width_1_1", |dev, out| {
        let cfg = flux::model::Config { depth: 1, depth_single_blocks: 1, ..flux::model::Config::dev() };
        let (vb, keys) = var_builder(DType::F32, dev);
        let model = flux::model::Flux::new(&cfg, vb)?;
        let i = flux_inputs(&cfg, 128, 64, 16, DType::F32, dev)?;
        out.insert("velocity".into(), flux_forward(&model, &i)?);
        Ok(Some(keys))
    })?;
    dump.case("flux_sampling", |dev, out| {
        for (n, shift) in
            [(1, None), (4, None), (4, Some(256)), (20, Some(1024)), (50, Some(4096)), (28, Some(4080))]
        {
            let ts = flux::sampling::get_schedule(n, shift.map(|s| (s, 0.5, 1.15)));
            let label = shift.map_or("schnell".to_string(), |s| format!("dev_{s}"));
            let len = ts.len();
            out.insert(format!("schedule_{n}_{label}"), Tensor::from_vec(ts, len, dev)?);
        }
        let latent = input("input.latent", &[1, 16, 8, 12], dev)?;
        let txt = input("input.t5", &[1, 12, 64], dev)?;
        let vec = input("input.clip", &[1, 64], dev)?;
        let s = flux::sampling::State::new(&txt, &vec, &latent)?;
        out.insert("unpacked".into(), flux::sampling::unpack(&s.img, 64, 96)?);
        out.insert("packed".into(), s.img.clone());
        out.insert("img_ids".into(), s.img_ids.clone());
        for (variant, guidance, steps, shift) in
            [("schnell", false, 4, None), ("dev", true, 6, Some((24, 0.5, 1.15)))]
        {
            let cfg = flux_tiny(2, 2, guidance);
            let (vb, _) = var_builder(DType::F32, dev);
            let model = flux::model::Flux::new(&cfg, vb)?;
            let ts = flux::sampling::get_schedule(steps, shift);
            let x =
                flux::sampling::denoise(&model, &s.img, &s.img_ids, &s.txt, &s.txt_ids, &s.vec, &ts, 3.5)?;
            out.insert(format!("denoised_{variant}"), x);
        }
        Ok(None)
    })
}
