//! Stable Diffusion's UNet.

use crate::dump::Dump;
use crate::procedural::{input, var_builder};
use anyhow::Result;
use candle_core::DType;
use candle_transformers::models::stable_diffusion as sd;

fn unet_config(
    blocks: &[(usize, Option<usize>, usize)],
    cross: usize,
    linear: bool,
    groups: usize,
) -> sd::unet_2d::UNet2DConditionModelConfig {
    sd::unet_2d::UNet2DConditionModelConfig {
        blocks: blocks
            .iter()
            .map(|&(out_channels, use_cross_attn, attention_head_dim)| sd::unet_2d::BlockConfig {
                out_channels,
                use_cross_attn,
                attention_head_dim,
            })
            .collect(),
        center_input_sample: false,
        cross_attention_dim: cross,
        downsample_padding: 1,
        flip_sin_to_cos: true,
        freq_shift: 0.,
        layers_per_block: 2,
        mid_block_scale_factor: 1.,
        norm_eps: 1e-5,
        norm_num_groups: groups,
        sliced_attention_size: None,
        use_linear_projection: linear,
    }
}

pub fn unet(dump: &Dump) -> Result<()> {
    // Candle's blocks do not pass the group count on: their residual blocks always use 32 groups, so the tiny ones do too.
    let cases = [
        (
            "unet_tiny_sd15",
            unet_config(&[(64, Some(1), 4), (128, Some(1), 4), (128, None, 4)], 64, false, 32),
            4,
        ),
        (
            "unet_tiny_sd21",
            unet_config(&[(64, Some(1), 2), (128, Some(1), 4), (128, None, 4)], 64, true, 32),
            4,
        ),
        (
            "unet_tiny_sdxl",
            unet_config(&[(64, None, 2), (128, Some(2), 4), (128, Some(3), 4)], 64, true, 32),
            4,
        ),
        (
            "unet_tiny_inpaint",
            unet_config(&[(64, Some(1), 4), (128, Some(1), 4), (128, None, 4)], 64, false, 32),
            9,
        ),
        (
            "unet_sd15",
            unet_config(
                &[(320, Some(1), 8), (640, Some(1), 8), (1280, Some(1), 8), (1280, None, 8)],
                768,
                false,
                32,
            ),
            4,
        ),
        (
            "unet_sd21",
            unet_config(
                &[(320, Some(1), 5), (640, Some(1), 10), (1280, Some(1), 20), (1280, None, 20)],
                1024,
                true,
                32,
            ),
            4,
        ),
        (
            "unet_sdxl",
            unet_config(&[(320, None, 5), (640, Some(2), 10), (1280, Some(10), 20)], 2048, true, 32),
            4,
        ),
    ];
    for (name, cfg, channels) in cases {
        dump.case(name, |dev, out| {
            let (vb, keys) = var_builder(DType::F32, dev);
            let cross = cfg.cross_attention_dim;
            let model = sd::unet_2d::UNet2DConditionModel::new(vb, channels, 4, false, cfg.clone())?;
            let x = input("input.unet_latent", &[1, channels, 16, 24], dev)?;
            let ctx = input("input.unet_context", &[1, 77, cross], dev)?;
            out.insert("noise_pred".into(), model.forward(&x, 601.0, &ctx)?);
            Ok(Some(keys))
        })?;
    }
    Ok(())
}
