//! Who holds an image. One image store may serve several agents, each with machines of its own; so a hold is named after
//! the machine *and* the agent's directory of machines, and an agent lets go of its own holds only.

use std::path::Path;

use vmpod_image::{Digest, Store, StoreError};
use vmpod_machine::MachineId;

/// What the holds of the agent with this directory of machines have in common: some hexadecimal digits of the directory's
/// path, whichever way that was written.
#[must_use]
pub fn holder_scope(machines_root: &Path) -> String {
    let path = machines_root.canonicalize().unwrap_or_else(|_| machines_root.to_owned());
    let mut scope = Digest::of(path.as_os_str().as_encoded_bytes()).hex();
    scope.truncate(16);
    scope
}

/// The name under which a machine holds its image.
pub(crate) fn holder(id: &MachineId, scope: &str) -> String {
    format!("{id}@{scope}")
}

/// Lets go of every image held for machines under `machines_root` that are gone. Blocks.
pub(crate) fn release_except(
    store: &Store,
    machines_root: &Path,
    present: impl Fn(&str) -> bool,
) -> Result<(), StoreError> {
    let scope = holder_scope(machines_root);
    for holder in store.holders()? {
        match holder.name.rsplit_once('@') {
            Some((machine, of)) if of == scope && !present(machine) => store.release(&holder.name)?,
            _ => {}
        }
    }
    Ok(())
}

/// Lets go of every image held for machines under `machines_root`. To be called when they are all removed and before the
/// directory itself is, since its path is what the holds are known by. Blocks.
pub fn release_all(store: &Store, machines_root: &Path) -> Result<(), StoreError> {
    release_except(store, machines_root, |_| false)
}

#[cfg(test)]
mod tests {
    use vmpod_image::{ImportOptions, Reference, Source, import};

    use super::*;

    #[tokio::test]
    async fn an_agent_lets_go_of_its_own_holds_only() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("images")).unwrap();
        let kernel = dir.path().join("kernel");
        std::fs::write(&kernel, b"not really a kernel").unwrap();
        let (name, options) =
            (Reference::parse("tiny").unwrap(), ImportOptions { kernel: Some(kernel), ..ImportOptions::default() });
        import(&store, Source::Kernel, &name, options).await.unwrap();
        let image = store.get(&name).unwrap().unwrap();
        let (own, other) = (dir.path().join("own"), dir.path().join("other"));
        for (root, id) in [(&own, "a-0"), (&own, "b-0"), (&other, "a-0")] {
            let into = root.join(id);
            std::fs::create_dir_all(&into).unwrap();
            let holder = holder(&MachineId::parse(id).unwrap(), &holder_scope(root));
            store.clone_image(&image, &into, None, &holder).unwrap();
        }
        let left = || store.holders().unwrap().into_iter().map(|holder| holder.name).collect::<Vec<_>>();
        release_except(&store, &own, |machine| machine == "a-0").unwrap();
        assert_eq!(left().len(), 2);
        assert!(!left().iter().any(|name| name.starts_with("b-0")), "{:?}", left());
        release_all(&store, &own).unwrap();
        assert_eq!(left(), [format!("a-0@{}", holder_scope(&other))]);
    }

    #[test]
    fn a_scope_is_of_the_directory_and_not_of_the_way_it_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (dir.path().join("one"), dir.path().join("other"));
        std::fs::create_dir(&one).unwrap();
        std::fs::create_dir(&other).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&one, &link).unwrap();
        assert_eq!(holder_scope(&one), holder_scope(&link));
        assert_ne!(holder_scope(&one), holder_scope(&other));
        assert_eq!(holder(&MachineId::parse("a-0").unwrap(), "00ff"), "a-0@00ff");
    }
}
