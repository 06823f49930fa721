//! What is computed before any network: the procedural rule itself, and FLUX's rotary tables.

use crate::dump::Dump;
use crate::procedural::{input, tokens, weight};
use anyhow::Result;
use candle_core::{DType, Module, Tensor};
use candle_transformers::models::flux::model::EmbedNd;

/// Each branch of the rule, past the 2^15 values that our side draws at a time.
pub fn procedural(dump: &Dump) -> Result<()> {
    dump.case("procedural", |dev, out| {
        for (name, dims, scale) in [
            ("case.linear.weight", &[260, 127][..], 1.0),
            ("case.conv.weight", &[7, 5, 3, 3], 1.0),
            ("case.scaled.weight", &[6, 11], 0.03),
            ("case.linear.bias", &[33], 1.0),
            ("case.norm.scale", &[33], 1.0),
            ("case.pos_embed", &[1, 9, 5], 1.0),
        ] {
            out.insert(name.into(), Tensor::from_vec(weight(name, dims, scale), dims, dev)?);
        }
        out.insert("case.input".into(), input("case.input", &[2, 3, 50], dev)?);
        out.insert("case.ids".into(), Tensor::new(tokens("case.ids", 100, 49406), dev)?);
        Ok(None)
    })
}

/// Cosines and sines at the released axes, ids in either dtype: bfloat16 rounds positions beyond 256, every
/// frequency, and every angle.
pub fn rotary(dump: &Dump) -> Result<()> {
    dump.case("flux_rope", |dev, out| {
        let places = [0u32, 1, 2, 3, 5, 11, 31, 32, 63, 64, 100, 127, 128, 255, 256, 257, 259, 511];
        let ids: Vec<f32> =
            places.iter().flat_map(|&p| [p as f32 / 512., p as f32, (511 - p) as f32]).collect();
        let ids = Tensor::from_vec(ids, (1, places.len(), 3), dev)?;
        for (name, dtype) in [("float32", DType::F32), ("bfloat16", DType::BF16)] {
            let pe = EmbedNd::new(128, 10_000, vec![16, 56, 56]).forward(&ids.to_dtype(dtype)?)?;
            // A 2 x 2 rotation each: its first column holds the cosine and the sine.
            let column = pe.narrow(5, 0, 1)?.squeeze(5)?;
            out.insert(name.into(), column.to_dtype(DType::F32)?);
        }
        out.insert("ids".into(), ids);
        Ok(None)
    })
}
