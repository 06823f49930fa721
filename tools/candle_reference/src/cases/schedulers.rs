//! Stable Diffusion's samplers.

use crate::dump::Dump;
use crate::procedural::input;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::stable_diffusion as sd;
use sd::schedulers::SchedulerConfig;

fn run_scheduler(cfg: &dyn SchedulerConfig, steps: usize, dev: &Device) -> Result<(Vec<f64>, f64, Tensor)> {
    let mut s = cfg.build(steps)?;
    let ts = s.timesteps().to_vec();
    let mut x = (input("input.sched_noise", &[1, 4, 4, 4], dev)? * s.init_noise_sigma())?;
    let mut xs = vec![x.clone()];
    for (i, &t) in ts.iter().enumerate() {
        let scaled = s.scale_model_input(x.clone(), t)?;
        let eps = ((scaled * 0.5)? + (input(&format!("input.sched_eps_{i}"), &[1, 4, 4, 4], dev)? * 0.5)?)?;
        x = s.step(&eps, t, &x)?;
        xs.push(x.clone());
    }
    Ok((ts.iter().map(|&t| t as f64).collect(), s.init_noise_sigma(), Tensor::cat(&xs, 0)?))
}

pub fn schedulers(dump: &Dump) -> Result<()> {
    use sd::schedulers::{PredictionType, TimestepSpacing};
    dump.case("schedulers", |dev, out| {
        let ddim = |p, s| sd::ddim::DDIMSchedulerConfig {
            prediction_type: p,
            timestep_spacing: s,
            ..Default::default()
        };
        let cases: Vec<(&str, Box<dyn SchedulerConfig>)> = vec![
            ("ddim_epsilon_leading", Box::new(ddim(PredictionType::Epsilon, TimestepSpacing::Leading))),
            ("ddim_epsilon_trailing", Box::new(ddim(PredictionType::Epsilon, TimestepSpacing::Trailing))),
            ("ddim_epsilon_linspace", Box::new(ddim(PredictionType::Epsilon, TimestepSpacing::Linspace))),
            ("ddim_v_leading", Box::new(ddim(PredictionType::VPrediction, TimestepSpacing::Leading))),
            ("unipc_karras", Box::new(sd::uni_pc::UniPCSchedulerConfig::default())),
            (
                "unipc_exponential",
                Box::new(sd::uni_pc::UniPCSchedulerConfig {
                    sigma_schedule: sd::uni_pc::SigmaSchedule::Exponential(Default::default()),
                    ..Default::default()
                }),
            ),
        ];
        for (name, cfg) in cases {
            for steps in [5usize, 10] {
                let (ts, sigma, xs) = run_scheduler(cfg.as_ref(), steps, dev)?;
                out.insert(format!("{name}_{steps}.timesteps"), Tensor::new(&ts[..], dev)?);
                out.insert(format!("{name}_{steps}.init_noise_sigma"), Tensor::new(&[sigma], dev)?);
                out.insert(format!("{name}_{steps}.trajectory"), xs);
            }
        }
        // Candle rounds the step ratio, so steps that do not divide 1000 give one timestep more.
        for (steps, spacing, label) in [
            (7, TimestepSpacing::Trailing, "trailing"),
            (30, TimestepSpacing::Trailing, "trailing"),
            (7, TimestepSpacing::Leading, "leading"),
            (30, TimestepSpacing::Leading, "leading"),
        ] {
            let s = ddim(PredictionType::Epsilon, spacing).build(steps)?;
            let ts: Vec<f64> = s.timesteps().iter().map(|&t| t as f64).collect();
            out.insert(format!("ddim_epsilon_{label}_{steps}.timesteps"), Tensor::new(&ts[..], dev)?);
        }
        // Euler ancestral adds random noise: only its deterministic parts can be compared, the last step among them.
        for (name, spacing) in [
            ("leading", TimestepSpacing::Leading),
            ("trailing", TimestepSpacing::Trailing),
            ("linspace", TimestepSpacing::Linspace),
        ] {
            let cfg = sd::euler_ancestral_discrete::EulerAncestralDiscreteSchedulerConfig {
                timestep_spacing: spacing,
                ..Default::default()
            };
            let mut s = cfg.build(8)?;
            let ts: Vec<f64> = s.timesteps().iter().map(|&t| t as f64).collect();
            let one = Tensor::ones((1, 1), DType::F32, dev)?;
            let scaled: Vec<Tensor> = s
                .timesteps()
                .iter()
                .map(|&t| s.scale_model_input(one.clone(), t))
                .collect::<candle_core::Result<_>>()?;
            out.insert(format!("euler_a_{name}_8.timesteps"), Tensor::new(&ts[..], dev)?);
            out.insert(
                format!("euler_a_{name}_8.init_noise_sigma"),
                Tensor::new(&[s.init_noise_sigma()], dev)?,
            );
            out.insert(format!("euler_a_{name}_8.scaled_ones"), Tensor::cat(&scaled, 0)?);
            let last = *s.timesteps().last().unwrap();
            let (x, eps) = (
                input("input.sched_noise", &[1, 4, 4, 4], dev)?,
                input("input.sched_eps_0", &[1, 4, 4, 4], dev)?,
            );
            out.insert(format!("euler_a_{name}_8.last_step"), s.step(&eps, last, &x)?);
        }
        Ok(None)
    })
}
