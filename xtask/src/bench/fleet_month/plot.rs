//! The plot: machines and waits of one week.

use std::fmt::Write as _;

use super::{Outcome, world::SAMPLE};

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 220.0;
const LEFT: f64 = 60.0;
const TOP: f64 = 40.0;
const COLOURS: [&str; 3] = ["#8c8c8c", "#d1762b", "#1f6fb4"];
const WEEK: usize = 7 * 86_400 / SAMPLE as usize;

/// The second week: machines above, the longest waits below.
pub(super) fn svg(outcomes: &[(&str, Outcome)]) -> String {
    let (width, height) = (WIDTH + LEFT + 20.0, 2.0 * (HEIGHT + TOP) + 30.0);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    let week = |outcome: &Outcome, of: fn(&(u32, u32)) -> u32| -> Vec<f64> {
        outcome.samples.iter().skip(WEEK).take(WEEK).map(|sample| f64::from(of(sample))).collect()
    };
    let machines: Vec<_> = outcomes.iter().map(|(name, outcome)| (*name, week(outcome, |sample| sample.0))).collect();
    let waits: Vec<_> = outcomes.iter().map(|(name, outcome)| (*name, week(outcome, |sample| sample.1 / 60))).collect();
    chart(&mut out, TOP, "machines", &machines);
    chart(&mut out, 2.0 * TOP + HEIGHT, "longest wait of a job that still waits, minutes", &waits);
    out.push_str("</svg>\n");
    out
}

fn chart(out: &mut String, top: f64, title: &str, lines: &[(&str, Vec<f64>)]) {
    let most = lines.iter().flat_map(|(_, values)| values).copied().fold(1.0, f64::max);
    let bottom = top + HEIGHT;
    // Writing to a string can't fail.
    writeln!(out, "<text x=\"{LEFT}\" y=\"{}\" font-weight=\"bold\">{title}</text>", top - 22.0).ok();
    for part in 0..=4 {
        let value = most * f64::from(part) / 4.0;
        let y = bottom - HEIGHT * f64::from(part) / 4.0;
        writeln!(out, "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{y}\" y2=\"{y}\" stroke=\"#dddddd\"/>", LEFT + WIDTH).ok();
        writeln!(out, "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{value:.0}</text>", LEFT - 6.0, y + 4.0).ok();
    }
    for (day, name) in ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"].iter().enumerate() {
        let x = LEFT + WIDTH * (f64::from(u32::try_from(day).unwrap_or(0)) + 0.5) / 7.0;
        writeln!(out, "<text x=\"{x:.0}\" y=\"{}\" text-anchor=\"middle\">{name}</text>", bottom + 16.0).ok();
    }
    for (index, (name, values)) in lines.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let step = WIDTH / f64::from(u32::try_from(values.len().max(1)).unwrap_or(u32::MAX));
        let points: Vec<String> = (0_u32..)
            .zip(values)
            .map(|(at, value)| format!("{:.1},{:.1}", LEFT + step * f64::from(at), bottom - HEIGHT * value / most))
            .collect();
        let points = points.join(" ");
        writeln!(out, "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.2\" points=\"{points}\"/>").ok();
        let x = LEFT + WIDTH - 220.0 + 80.0 * f64::from(u32::try_from(index).unwrap_or(0));
        writeln!(out, "<text x=\"{x}\" y=\"{}\" fill=\"{colour}\">{name}</text>", top - 22.0).ok();
    }
}
