//! Boots a kernel as a machine, runs a command in it, and says how long each step took.
//!
//! ```text
//! cargo run -p vmpod-machine --example boot -- KERNEL INITRD CMDLINE MARKER [COMMAND…]
//! ```
//!
//! With `MARKER` empty, the guest is tried until it answers.
#![expect(clippy::print_stdout, reason = "a program for people")]

use std::sync::Arc;
use std::time::Instant;

use vmpod_machine::qemu::Qemu;
use vmpod_machine::{
    Accel, Access, Arch, Auth, Boot, Cpus, Devices, Exec, GuestOs, GuestState, MacAddr, MachineId, Machines, Memory,
    Network, Seed, SeedForm, Spec, loopback,
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let mut next = || arguments.next().ok_or("usage: boot KERNEL INITRD CMDLINE MARKER [COMMAND…]");
    let (kernel, initrd, cmdline, marker) = (next()?, next()?, next()?, next()?);
    let command: Vec<String> = arguments.collect();
    let command = if command.is_empty() { vec!["true".to_owned()] } else { command };

    let root = std::env::temp_dir().join(format!("vmpod-boot-{}", std::process::id()));
    let machines = Machines::open(&root, Arc::new(Qemu::default()))?;
    let id = MachineId::parse("boot-0")?;
    let key = machines.ssh_key(&id)?;
    let mac = MacAddr::derive(id.as_str());
    let spec = Spec {
        id: id.clone(),
        cpus: Cpus::ONE,
        memory: Memory::from_mib(256),
        arch: Arch::host().ok_or("unknown architecture")?,
        os: GuestOs::Linux,
        boot: Boot::Kernel { kernel: kernel.into(), initrd: Some(initrd.into()), cmdline },
        disks: Vec::new(),
        seed: Some(Seed {
            form: SeedForm::Nocloud,
            instance_id: id.to_string(),
            hostname: id.to_string(),
            authorized_keys: vec![key.public],
            user_data: None,
            vendor_data: None,
            network_config: None,
        }),
        networks: vec![Network::User {
            address: loopback::allocate(&id, &machines.addresses()).ok_or("no address is left")?,
            ssh_port: 2222,
            forwards: Vec::new(),
            host_ports: Vec::new(),
            mac,
        }],
        access: Access {
            user: "root".to_owned(),
            auth: Auth::Key(key.path),
            ready_marker: (!marker.is_empty()).then_some(marker),
            port: 22,
        },
        accel: Accel::Tcg,
        snapshot: None,
        mac: None,
        devices: Devices::Virtio,
        tpm: false,
        shares: Vec::new(),
    };
    let begin = Instant::now();
    let say = |what: &str| println!("{:8.3} s  {what}", begin.elapsed().as_secs_f64());
    let machine = machines.create(spec).await?;
    say("created");
    machine.start().await?;
    say("process answers");
    let guest = machine.guest();
    let mut ready = guest.ready();
    loop {
        let state = ready.borrow_and_update().clone();
        say(&state.to_string());
        if state == GuestState::Ready {
            break;
        }
        ready.changed().await?;
    }
    let (status, out, err) = guest.exec(Exec::new(command)).await?.output().await?;
    say(&format!("the command ended with {}", status.code()));
    print!("{}{}", String::from_utf8_lossy(&out), String::from_utf8_lossy(&err));
    let again = Instant::now();
    guest.exec(Exec::new(["true"])).await?.output().await?;
    println!("{:8.3} s  for one more command", again.elapsed().as_secs_f64());
    println!("{:?}", machine.stats().await?);
    let state = machine.stop(std::time::Duration::from_secs(10)).await?;
    say(&format!("{state:?}"));
    machines.remove(&id, true).await?;
    std::fs::remove_dir_all(&root)?;
    Ok(())
}
