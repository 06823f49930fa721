//! candle_reference OUT_DIR [CASE_PREFIX]         writes every case whose name starts with CASE_PREFIX
//! candle_reference run SPEC.json OUT.safetensors   Candle's text-to-image over a checkpoint, recorded (see run/)
//! candle_reference bench                         times full-width FLUX blocks on this CPU
mod bench;
mod cases;
mod dump;
mod procedural;
mod run;

use anyhow::{ensure, Result};
use std::path::{Path, PathBuf};

const USAGE: &str = "usage: candle_reference OUT_DIR [CASE_PREFIX] | run SPEC.json OUT.safetensors | bench";

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.first().map(String::as_str) {
        Some("bench") => bench::bench(),
        Some("run") => {
            ensure!(args.len() == 3, USAGE);
            run::run(Path::new(&args[1]), Path::new(&args[2]))
        }
        Some(dir) if args.len() <= 2 && !dir.starts_with('-') => {
            std::fs::create_dir_all(dir)?;
            let prefix = args.get(1).cloned().unwrap_or_default();
            cases::all(&dump::Dump { dir: PathBuf::from(dir), prefix, dev: candle_core::Device::Cpu })
        }
        _ => anyhow::bail!(USAGE),
    }
}
