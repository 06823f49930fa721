//! Stable Diffusion 3's transformer.

use crate::dump::Dump;
use crate::procedural::{input, var_builder_with, Weights};
use anyhow::Result;
use candle_core::{DType, Tensor};
use candle_transformers::models::mmdit;

pub fn mmdit_sd3(dump: &Dump) -> Result<()> {
    // Candle's timestep embedding is fixed to float16, so the whole model has to be.
    for (name, absent) in [("mmdit_tiny_sd3_f16", &["attn2", ".ln_"][..]), ("mmdit_tiny_sd35_f16", &[][..])] {
        dump.case(name, |dev, out| {
            let cfg = mmdit::model::Config {
                depth: 2,
                head_size: 64,
                adm_in_channels: 96,
                context_embed_size: 80,
                patch_size: 2,
                in_channels: 16,
                out_channels: 16,
                pos_embed_max_size: 32,
                frequency_embedding_size: 256,
            };
            let (vb, keys) = var_builder_with(Weights { absent, ..Default::default() }, DType::F16, dev);
            let model = mmdit::model::MMDiT::new(&cfg, false, vb)?;
            let half = |name: &str, dims: &[usize]| input(name, dims, dev)?.to_dtype(DType::F16);
            let t = Tensor::new(&[750f32], dev)?;
            let velocity = model.forward(
                &half("input.mmdit_latent", &[1, 16, 8, 12])?,
                &t,
                &half("input.mmdit_y", &[1, 96])?,
                &half("input.mmdit_context", &[1, 10, 80])?,
                None,
            )?;
            out.insert("velocity".into(), velocity.to_dtype(DType::F32)?);
            Ok(Some(keys))
        })?;
    }
    Ok(())
}
