//! CLIP and T5 text encoders.

use crate::dump::Dump;
use crate::procedural::{tokens, var_builder};
use anyhow::Result;
use candle_core::{DType, Module, Tensor};
use candle_transformers::models::stable_diffusion as sd;
use candle_transformers::models::{clip, t5};

pub fn clip_text(dump: &Dump) -> Result<()> {
    let tiny = clip::text_model::ClipTextConfig {
        vocab_size: 512,
        projection_dim: 64,
        activation: clip::text_model::Activation::QuickGelu,
        intermediate_size: 256,
        embed_dim: 64,
        max_position_embeddings: 77,
        pad_with: None,
        num_hidden_layers: 3,
        num_attention_heads: 4,
    };
    let large = clip::text_model::ClipTextConfig {
        vocab_size: 49408,
        projection_dim: 768,
        activation: clip::text_model::Activation::QuickGelu,
        intermediate_size: 3072,
        embed_dim: 768,
        max_position_embeddings: 77,
        pad_with: None,
        num_hidden_layers: 12,
        num_attention_heads: 12,
    };
    // The end token stands at 15, then pads of the same id; or last, as Candle's own example has it.
    for (name, cfg, len) in [
        ("clip_flux_tiny", tiny.clone(), 77),
        ("clip_flux_tiny_unpadded", tiny, 16),
        ("clip_flux_large", large, 77),
    ] {
        dump.case(name, |dev, out| {
            let (vb, keys) = var_builder(DType::F32, dev);
            let model = clip::text_model::ClipTextTransformer::new(vb.pp("text_model"), &cfg)?;
            let mut ids = tokens("input.clip_ids", len, cfg.vocab_size as u64 - 2);
            ids[0] = cfg.vocab_size as u32 - 2;
            for id in ids[15..].iter_mut() {
                *id = cfg.vocab_size as u32 - 1;
            }
            let ids = Tensor::new(&ids[..], dev)?.unsqueeze(0)?;
            out.insert("last_hidden_state".into(), model.forward_with_mask(&ids, usize::MAX)?);
            out.insert("pooled".into(), model.forward(&ids)?);
            out.insert("input_ids".into(), ids);
            Ok(Some(keys))
        })?;
    }
    for (name, cfg, vocab) in [
        ("clip_sd15", sd::clip::Config::v1_5(), 49408u64),
        ("clip_sd21", sd::clip::Config::v2_1(), 49408),
        ("clip_sdxl_2", sd::clip::Config::sdxl2(), 49408),
    ] {
        dump.case(name, |dev, out| {
            let (vb, keys) = var_builder(DType::F32, dev);
            let model = sd::clip::ClipTextTransformer::new(vb, &cfg)?;
            let mut ids = tokens("input.clip_ids", 77, vocab - 2);
            ids[0] = 49406;
            for id in ids[20..].iter_mut() {
                *id = 49407;
            }
            let ids = Tensor::new(&ids[..], dev)?.unsqueeze(0)?;
            let (last, penultimate) = model.forward_until_encoder_layer(&ids, usize::MAX, -2)?;
            out.insert("last_hidden_state".into(), last);
            out.insert("penultimate".into(), penultimate);
            out.insert("input_ids".into(), ids);
            Ok(Some(keys))
        })?;
    }
    Ok(())
}

pub fn t5_config(
    d_model: usize,
    d_ff: usize,
    heads: usize,
    layers: usize,
    vocab: usize,
) -> Result<t5::Config> {
    Ok(serde_json::from_value(serde_json::json!({
        "vocab_size": vocab, "d_model": d_model, "d_kv": 64, "d_ff": d_ff, "num_layers": layers, "num_decoder_layers": layers,
        "num_heads": heads, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
        "dropout_rate": 0.1, "layer_norm_epsilon": 1e-6, "initializer_factor": 1.0, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": false, "is_encoder_decoder": true, "pad_token_id": 0, "eos_token_id": 1
    }))?)
}

pub fn t5_encoder(dump: &Dump) -> Result<()> {
    for (name, d_model, d_ff, heads, layers, vocab) in [
        ("t5_tiny_1", 64, 128, 4, 1, 512),
        ("t5_tiny_3", 64, 128, 4, 3, 512),
        ("t5_xxl_width_2", 4096, 10240, 64, 2, 32128),
    ] {
        dump.case(name, |dev, out| {
            let cfg = t5_config(d_model, d_ff, heads, layers, vocab)?;
            let (vb, keys) = var_builder(DType::F32, dev);
            let mut model = t5::T5EncoderModel::load(vb, &cfg)?;
            let mut ids = tokens("input.t5_ids", 14, vocab as u64 - 2);
            for id in ids.iter_mut() {
                *id += 2;
            }
            ids.push(1);
            ids.resize(256, 0);
            let ids = Tensor::new(&ids[..], dev)?.unsqueeze(0)?;
            let hidden = model.forward(&ids)?;
            // Full-width output is 4 MiB: keep the prompt's tokens and the first pads.
            out.insert("last_hidden_state".into(), hidden.narrow(1, 0, 32)?);
            out.insert("input_ids".into(), ids);
            Ok(Some(keys))
        })?;
    }
    Ok(())
}
