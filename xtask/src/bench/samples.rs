//! Repeated measurements of one thing.

/// Measurements of one thing, in one unit.
#[derive(Debug, Default)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The middle value; the mean of the two middle ones of an even number. Not a number when there are none.
    pub(crate) fn median(&self) -> f64 {
        let sorted = self.sorted();
        let middle = sorted.len() / 2;
        match sorted.len() {
            0 => f64::NAN,
            even if even % 2 == 0 => f64::midpoint(sorted[middle - 1], sorted[middle]),
            _ => sorted[middle],
        }
    }

    /// The smallest value that so many in a hundred don't exceed. Not a number when there are none.
    pub(crate) fn percentile(&self, percent: usize) -> f64 {
        let sorted = self.sorted();
        let rank = (sorted.len() * percent).div_ceil(100).max(1);
        sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn least(&self) -> f64 {
        self.sorted().first().copied().unwrap_or(f64::NAN)
    }

    pub(crate) fn most(&self) -> f64 {
        self.sorted().last().copied().unwrap_or(f64::NAN)
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        let of = |values: &[f64]| Samples(values.to_vec()).median();
        assert!((of(&[3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((of(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < f64::EPSILON);
        assert!(of(&[]).is_nan());
    }

    #[test]
    fn a_percentile_is_the_value_of_its_rank() {
        let samples = Samples((1..=200).rev().map(f64::from).collect());
        assert!((samples.percentile(50) - 100.0).abs() < f64::EPSILON);
        assert!((samples.percentile(99) - 198.0).abs() < f64::EPSILON);
        assert!((samples.percentile(100) - 200.0).abs() < f64::EPSILON);
        assert!(Samples::default().percentile(99).is_nan());
    }

    #[test]
    fn the_ends_are_the_ends() {
        let samples = Samples(vec![3.0, 1.0, 2.0]);
        assert!((samples.least() - 1.0).abs() < f64::EPSILON);
        assert!((samples.most() - 3.0).abs() < f64::EPSILON);
    }
}
