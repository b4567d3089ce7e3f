//! A machine for somebody who has no pod, made as a pod's machine is: what builds images.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use vmpod_image::{Image, Store};
use vmpod_machine::{Accel, Arch, Machine, MachineId, Machines, loopback};

use crate::{error_chain, holders, network, options::MachineDefaults, pod::PodUid, translate};

/// What the machine is to be.
#[derive(Clone, Debug)]
pub struct PlainMachine {
    /// Its id, and its guest's host name.
    pub id: MachineId,
    /// Processors.
    pub cpus: u32,
    /// Bytes of memory; what the image needs, or the usual, unless given.
    pub memory: Option<u64>,
    /// The least size of the first disk, bytes.
    pub disk: Option<u64>,
    /// Cloud-init user data.
    pub user_data: Option<String>,
    /// What executes it.
    pub accel: Accel,
}

/// Clones the image and writes the machine down; it isn't started. The image is held in the machine's name, as for a pod's: see
/// [`crate::release_all`]. The error is a text for people.
pub async fn plain_machine(
    store: &Store,
    machines: &Machines,
    image: &Image,
    wanted: PlainMachine,
) -> Result<Machine, String> {
    let name = image.references.first().map_or_else(|| image.digest.to_string(), ToString::to_string);
    let mut limits = BTreeMap::from([("cpu".to_owned(), Quantity(wanted.cpus.to_string()))]);
    if let Some(memory) = wanted.memory {
        limits.insert("memory".to_owned(), Quantity(memory.to_string()));
    }
    if let Some(disk) = wanted.disk {
        limits.insert("ephemeral-storage".to_owned(), Quantity(disk.to_string()));
    }
    let container = Container {
        name: "machine".to_owned(),
        resources: Some(ResourceRequirements { limits: Some(limits), ..ResourceRequirements::default() }),
        ..Container::default()
    };
    let size = translate::size(&container, &name, &image.config, MachineDefaults::default())
        .map_err(|error| error.to_string())?;
    let mut pod = Pod::default();
    pod.metadata.name = Some(wanted.id.to_string());
    let id = wanted.id;
    let address = loopback::allocate(&id, &machines.addresses()).ok_or("no loopback address is free")?;
    let apple = machines.hypervisor() == vmpod_machine::vz::NAME;
    let prepared = {
        let (store, machines, image, id) = (store.clone(), machines.clone(), image.clone(), id.clone());
        tokio::task::spawn_blocking(move || {
            let dir = machines.directory(&id).map_err(|error| error_chain(&error))?;
            let holder = holders::holder(&id, &holders::holder_scope(machines.root()));
            let clone = if apple { Store::clone_image_raw } else { Store::clone_image };
            let clone = clone(&store, &image, dir.path(), size.disk, &holder).map_err(|error| error_chain(&error))?;
            let key = machines.ssh_key(&id).map_err(|error| error_chain(&error))?;
            Ok::<_, String>((clone, key))
        })
        .await
    };
    let (clone, key) = prepared.map_err(|error| error.to_string())??;
    let uid = PodUid::parse(id.as_str()).map_err(|error| error.to_string())?;
    let spec = translate::machine(translate::Parts {
        id,
        uid: &uid,
        pod: &pod,
        container: &container,
        image: &name,
        clone: &clone,
        size,
        place: if apple { network::Place::Vmnet(None) } else { network::Place::User(address) },
        key: key.path,
        authorized_keys: vec![key.public],
        user_data: wanted.user_data,
        login: None,
        usual_login: None,
        accel: wanted.accel,
        host: Arch::host(),
        low_ports: false,
        shares: Vec::new(),
    })
    .map_err(|error| error.to_string())?;
    machines.create(spec).await.map_err(|error| error_chain(&error))
}
