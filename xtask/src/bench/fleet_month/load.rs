//! Jobs as teams make them: working days with a morning and an afternoon, quiet nights and weekends, nightly builds on large
//! machines, and pipelines that bring several jobs at once.

use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use super::{DAY, FLAVOURS};

/// A job: when it comes, of which flavour, and how many seconds it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) at: u32,
    pub(super) flavour: usize,
    pub(super) seconds: u32,
}

/// How much of a working day's load comes in each hour of it.
const HOURS: [u32; 24] = [2, 1, 1, 1, 1, 2, 3, 5, 10, 15, 17, 16, 11, 14, 17, 17, 16, 13, 9, 6, 5, 4, 3, 2];
/// The days of a week, from Monday, in percent of a working day.
const DAYS: [u32; 7] = [100, 105, 105, 100, 90, 12, 10];

/// About `count` jobs over so many days, by a seed, in the order of their coming.
pub(super) fn jobs(days: u32, count: u32, seed: u64) -> Vec<Job> {
    let mut random = StdRng::seed_from_u64(seed);
    let weights: Vec<f64> =
        (0..days * 24).map(|hour| f64::from(HOURS[(hour % 24) as usize] * DAYS[(hour / 24 % 7) as usize])).collect();
    let all: f64 = weights.iter().sum();
    let mut jobs = Vec::new();
    for (flavour, about) in FLAVOURS.iter().enumerate() {
        for (hour, weight) in (0..).zip(&weights) {
            // Half of the largest ones are nightly builds.
            let night = if about.cpus == 16 && hour % 24 == 22 { 0.5 * all / f64::from(days) } else { 0.0 };
            let usual = if about.cpus == 16 { 0.5 * weight } else { *weight };
            let mean = f64::from(count * about.part / 100) * (usual + night) / all;
            // An hour is busier or calmer than its like.
            let mut left = mean * (0.3 * normal(&mut random) - 0.045).exp();
            while left > 0.0 {
                // A pipeline brings one to a dozen jobs within half a minute.
                let size = random.random_range(1..=12_u32);
                left -= f64::from(size);
                let start = hour * 3600 + random.random_range(0..3600);
                for _ in 0..size {
                    let at = start + random.random_range(0..30);
                    jobs.push(Job { at, flavour, seconds: seconds(about.job, &mut random) });
                }
            }
        }
    }
    jobs.retain(|job| job.at < days * DAY);
    jobs.sort_by_key(|job| job.at);
    jobs
}

/// Long ones are much longer than short ones: log-normal, with this mean.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is bounded just before")]
fn seconds(mean: f64, random: &mut StdRng) -> u32 {
    const SIGMA: f64 = 0.9;
    let seconds = mean * (SIGMA * normal(random) - SIGMA * SIGMA / 2.0).exp();
    seconds.clamp(5.0, 7200.0) as u32
}

/// By Box and Muller.
fn normal(random: &mut StdRng) -> f64 {
    let (a, b): (f64, f64) = (random.random_range(f64::EPSILON..1.0), random.random());
    (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
}
