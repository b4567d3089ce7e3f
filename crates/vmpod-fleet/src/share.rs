//! How pools share what there is. Pure.
//!
//! What runs keeps its place. The rest of the capacity goes to the pools by priority, one runner after the other, the pool
//! with the smallest part of its wish first: so idle machines of one flavour make room for the waiting jobs of another, and
//! a busy one never does.

/// An amount of processors (in thousandths) and memory (in bytes).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    /// Thousandths of a processor.
    pub millicpus: u64,
    /// Bytes.
    pub memory: u64,
}

impl Amount {
    fn times(self, count: u32) -> Self {
        let count = u64::from(count);
        Self { millicpus: self.millicpus.saturating_mul(count), memory: self.memory.saturating_mul(count) }
    }

    fn fits(self, room: Self) -> bool {
        self.millicpus <= room.millicpus && self.memory <= room.memory
    }

    fn minus(self, other: Self) -> Self {
        Self {
            millicpus: self.millicpus.saturating_sub(other.millicpus),
            memory: self.memory.saturating_sub(other.memory),
        }
    }
}

/// What a pool would like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Pools of a higher priority come first.
    pub priority: i32,
    /// One runner.
    pub each: Amount,
    /// Runners with a job: they stay whatever happens.
    pub busy: u32,
    /// How many runners it wants in all.
    pub wanted: u32,
}

/// How many runners each pool may have of a capacity that all of them use, in the order of the wishes.
#[must_use]
pub fn share(wishes: &[Wish], capacity: Amount) -> Vec<u32> {
    let mut room = capacity;
    let mut given: Vec<u32> = wishes.iter().map(|wish| wish.busy).collect();
    for wish in wishes {
        room = room.minus(wish.each.times(wish.busy));
    }
    loop {
        // Highest priority, then the smallest part of the wish: by cross-multiplication, so without rounding.
        let next = wishes
            .iter()
            .enumerate()
            .filter(|(index, wish)| given[*index] < wish.wanted && wish.each.fits(room))
            .min_by(|(a, x), (b, y)| {
                let part = |index: usize, wish: &Wish| (u64::from(given[index]), u64::from(wish.wanted));
                let ((ga, wa), (gb, wb)) = (part(*a, x), part(*b, y));
                y.priority.cmp(&x.priority).then((ga * wb).cmp(&(gb * wa))).then(a.cmp(b))
            });
        let Some((index, wish)) = next else { return given };
        // Something that needs nothing is never short.
        if wish.each == Amount::default() {
            given[index] = wish.wanted;
            continue;
        }
        given[index] += 1;
        room = room.minus(wish.each);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn wish(priority: i32, cpus: u64, busy: u32, wanted: u32) -> Wish {
        Wish { priority, each: Amount { millicpus: cpus * 1000, memory: cpus * GIB }, busy, wanted }
    }

    fn cpus(count: u64) -> Amount {
        Amount { millicpus: count * 1000, memory: count * GIB }
    }

    #[test]
    fn idle_room_of_one_flavour_goes_to_the_waiting_jobs_of_another() {
        // 16 processors: four busy small ones, and one large pool that would keep two idle.
        assert_eq!(share(&[wish(0, 4, 0, 4), wish(0, 16, 0, 0)], cpus(16)), [4, 0]);
        // Equal priorities share by their wishes.
        assert_eq!(share(&[wish(0, 1, 0, 8), wish(0, 1, 0, 8)], cpus(8)), [4, 4]);
        // A higher one comes first.
        assert_eq!(share(&[wish(0, 1, 0, 8), wish(1, 1, 0, 8)], cpus(8)), [0, 8]);
    }

    #[test]
    fn what_runs_keeps_its_place() {
        assert_eq!(share(&[wish(0, 4, 3, 3), wish(9, 4, 0, 4)], cpus(16)), [3, 1]);
        // Even beyond what there is.
        assert_eq!(share(&[wish(0, 4, 3, 0), wish(9, 4, 0, 4)], cpus(8)), [3, 0]);
    }

    proptest! {
        #[test]
        fn nobody_loses_a_job_and_nothing_is_given_twice(
            wishes in proptest::collection::vec((0..3i32, 1..9u64, 0..6u32, 0..20u32), 0..6), capacity in 0..64u64,
        ) {
            let wishes: Vec<Wish> = wishes.into_iter().map(|(p, c, b, w)| wish(p, c, b, w)).collect();
            let given = share(&wishes, cpus(capacity));
            let mut used = 0;
            for (wish, given) in wishes.iter().zip(&given) {
                prop_assert!(*given >= wish.busy && *given <= wish.wanted.max(wish.busy));
                used += wish.each.millicpus * u64::from(*given);
            }
            let busy: u64 = wishes.iter().map(|wish| wish.each.millicpus * u64::from(wish.busy)).sum();
            prop_assert!(used <= (capacity * 1000).max(busy));
            // Nothing is left over that somebody of the highest unserved priority could use.
            let left = (capacity * 1000).saturating_sub(used);
            for (wish, given) in wishes.iter().zip(&given) {
                prop_assert!(*given >= wish.wanted || wish.each.millicpus > left || busy > capacity * 1000);
            }
        }
    }
}
