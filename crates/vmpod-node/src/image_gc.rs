//! Keeping the images within bounds, as the kubelet does: when the file system fills up, or the store passes its budget, the images
//! that nobody has used for longest go. What a machine uses stays, and so does what has a local name.

use std::time::Duration;

use tokio::sync::watch;
use vmpod_image::{FileSystem, Prune, Store, StoreError};

/// Between two looks. How full a file system is nobody tells: it must be asked.
const PERIOD: Duration = Duration::from_mins(1);

/// When images are removed, and how many.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageGc {
    /// Removing begins when so many percent of the file system are used.
    pub high_percent: u8,
    /// And ends when no more than so many are.
    pub low_percent: u8,
    /// The most bytes that images take, however much room there is.
    pub budget: Option<u64>,
    /// An image that came or was used within this time stays.
    pub minimum_age: Duration,
}

impl Default for ImageGc {
    /// The kubelet's own: 85 and 80 percent, two minutes, no budget.
    fn default() -> Self {
        Self { high_percent: 85, low_percent: 80, budget: None, minimum_age: Duration::from_mins(2) }
    }
}

/// What the last look found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct ImageRoom {
    /// Bytes that had to go and didn't, because what is left is in use: the node is under disk pressure.
    pub short: u64,
    /// Bytes freed.
    pub freed: u64,
}

/// The bytes that must go.
fn excess(gc: ImageGc, disk: FileSystem, images: u64) -> u64 {
    let used = disk.capacity.saturating_sub(disk.available);
    let share = |percent: u8| disk.capacity / 100 * u64::from(percent.min(100));
    let over = if used >= share(gc.high_percent) { used.saturating_sub(share(gc.low_percent)) } else { 0 };
    over.max(images.saturating_sub(gc.budget.unwrap_or(u64::MAX)))
}

/// Looks once, and removes what must go. Blocks.
fn look(store: &Store, gc: ImageGc) -> Result<ImageRoom, StoreError> {
    let images = store.image_bytes()?;
    let excess = excess(gc, store.file_system()?, images);
    if excess == 0 {
        return Ok(ImageRoom::default());
    }
    let pruned = store.prune(Prune {
        down_to: Some(images.saturating_sub(excess)),
        idle_for: gc.minimum_age,
        ..Prune::default()
    })?;
    if !pruned.images.is_empty() {
        tracing::info!(images = pruned.images.len(), bytes = pruned.bytes, "removed images to make room");
    }
    Ok(ImageRoom { short: excess.saturating_sub(pruned.bytes), freed: pruned.bytes })
}

/// Looks for ever; each look's result goes to `room`.
pub(crate) async fn run(store: Store, gc: ImageGc, room: watch::Sender<ImageRoom>) {
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let store = store.clone();
        match tokio::task::spawn_blocking(move || look(&store, gc)).await {
            Ok(Ok(found)) => {
                if found.short > 0 && room.borrow().short == 0 {
                    tracing::warn!(bytes = found.short, "the images in use leave too little room");
                }
                room.send_replace(found);
            }
            Ok(Err(error)) => tracing::warn!(%error, "can't look after the room for images"),
            Err(error) => tracing::warn!(%error, "looking after the room for images failed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use vmpod_image::{ImportOptions, Reference, Source, import};

    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_marks_are_the_kubelets() {
        let gc = ImageGc::default();
        let disk = |used: u64| FileSystem { capacity: 100 * GIB, available: (100 - used) * GIB };
        assert_eq!(excess(gc, disk(84), 0), 0);
        assert_eq!(excess(gc, disk(85), 0), 5 * GIB, "down to the low mark");
        assert_eq!(excess(gc, disk(100), 0), 20 * GIB);
        let budget = ImageGc { budget: Some(10 * GIB), ..gc };
        assert_eq!(excess(budget, disk(10), 12 * GIB), 2 * GIB);
        assert_eq!(excess(budget, disk(90), 11 * GIB), 10 * GIB, "whichever is more");
        assert_eq!(excess(budget, disk(10), 10 * GIB), 0);
    }

    #[tokio::test]
    async fn a_budget_spares_what_a_machine_uses_and_tells_what_is_short() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("images")).unwrap();
        let mut images = Vec::new();
        for number in 0..3u8 {
            let raw = dir.path().join("disk.raw");
            std::fs::write(&raw, vec![number + 1; 1 << 20]).unwrap();
            let name = Reference::parse(&format!("registry.example.com/x:{number}")).unwrap();
            images.push(import(&store, Source::Raw(raw), &name, ImportOptions::default()).await.unwrap());
        }
        store.clone_image(&images[0], &dir.path().join("machine"), None, "machine").unwrap();
        let gc = ImageGc { budget: Some(2 << 20), minimum_age: Duration::ZERO, high_percent: 100, low_percent: 100 };
        let young = ImageGc { minimum_age: Duration::from_hours(1), ..gc };
        assert_eq!(look(&store, young).unwrap(), ImageRoom { short: 1 << 20, freed: 0 });
        assert_eq!(look(&store, gc).unwrap().short, 0);
        assert_eq!(store.list().unwrap().len(), 2);
        let nothing = look(&store, ImageGc { budget: Some(0), ..gc }).unwrap();
        assert_eq!((nothing.short, store.list().unwrap()[0].digest), (1 << 20, images[0].digest));
    }
}
