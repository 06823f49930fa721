//! The cases, by what they are about. A case is one `dump.case(name, |dev, out| ...)`.

pub mod autoencoder;
pub mod flux;
pub mod gguf;
pub mod mmdit;
pub mod schedulers;
pub mod tables;
pub mod text;
pub mod unet;

use crate::dump::Dump;
use anyhow::Result;

pub fn all(dump: &Dump) -> Result<()> {
    // Quantised products otherwise depend on the processor (with VNNI, Q8_0 takes K-quant activations).
    std::env::set_var("MISTRALRS_FORCE_AVX2", "1");
    tables::procedural(dump)?;
    tables::rotary(dump)?;
    text::clip_text(dump)?;
    text::t5_encoder(dump)?;
    flux::flux_euler(dump)?;
    flux::flux_transformer(dump)?;
    autoencoder::flux_autoencoder(dump)?;
    gguf::gguf(dump)?;
    unet::unet(dump)?;
    autoencoder::sd_autoencoder(dump)?;
    schedulers::schedulers(dump)?;
    mmdit::mmdit_sd3(dump)
}
