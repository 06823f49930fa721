//! The autoencoders: FLUX's under the authors' names, Stable Diffusion's under those of diffusers.

use crate::dump::Dump;
use crate::procedural::{input, var_builder, var_builder_with, Weights};
use anyhow::Result;
use candle_core::{DType, Module};
use candle_transformers::models::flux;
use candle_transformers::models::stable_diffusion as sd;

pub fn flux_autoencoder(dump: &Dump) -> Result<()> {
    // 64 channels: with 32 in 32 groups a norm would cancel the biases before it.
    let tiny = flux::autoencoder::Config { ch: 64, ..flux::autoencoder::Config::dev() };
    let small: fn(&str) -> f64 = |name| if name.contains(".conv1.") { 0.03 } else { 1.0 };
    let plain = Weights::default().scale;
    for (name, cfg, latent, scale) in [
        ("ae_tiny", tiny.clone(), 8, plain),
        ("ae_tiny_small", tiny, 8, small),
        ("ae_full", flux::autoencoder::Config::dev(), 8, plain),
    ] {
        dump.case(name, |dev, out| {
            let (vb, keys) = var_builder_with(Weights { scale, ..Default::default() }, DType::F32, dev);
            let model = flux::autoencoder::AutoEncoder::new(&cfg, vb.clone())?;
            let z = input("input.ae_latent", &[1, 16, latent, latent + 4], dev)?;
            out.insert("decoded".into(), model.decode(&z)?);
            let x = input("input.ae_image", &[1, 3, 8 * latent, 8 * latent + 16], dev)?;
            let encoder = flux::autoencoder::Encoder::new(&cfg, vb.pp("encoder"))?;
            out.insert("encoder_moments".into(), encoder.forward(&x)?);
            Ok(Some(keys))
        })?;
    }
    Ok(())
}

pub fn sd_autoencoder(dump: &Dump) -> Result<()> {
    let full = sd::vae::AutoEncoderKLConfig {
        block_out_channels: vec![128, 256, 512, 512],
        layers_per_block: 2,
        latent_channels: 4,
        norm_num_groups: 32,
        use_quant_conv: true,
        use_post_quant_conv: true,
    };
    let tiny = sd::vae::AutoEncoderKLConfig {
        block_out_channels: vec![32, 64, 64, 64],
        norm_num_groups: 8,
        ..full.clone()
    };
    for (name, cfg) in [("vae_tiny", tiny), ("vae_sd", full)] {
        dump.case(name, |dev, out| {
            let (vb, keys) = var_builder(DType::F32, dev);
            let model = sd::vae::AutoEncoderKL::new(vb, 3, 3, cfg.clone())?;
            out.insert("decoded".into(), model.decode(&input("input.vae_latent", &[1, 4, 8, 12], dev)?)?);
            Ok(Some(keys))
        })?;
    }
    Ok(())
}
