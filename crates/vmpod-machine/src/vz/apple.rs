//! The framework itself: the only place that calls it.
//!
//! A `VZVirtualMachine` belongs to one serial dispatch queue: it is made there, called there, and calls back there. Everything here
//! that touches one is a closure on [`Apple::queue`]; answers come out through channels. The helper's own runtime never runs on that
//! queue, and the process's main thread serves the main queue ([`main_loop`]), which parts of the framework use.
//!
//! Source of what is called: <https://developer.apple.com/documentation/virtualization>.
#![expect(unsafe_code, reason = "every call of an Objective-C framework is one")]

use std::cell::RefCell;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use block2::RcBlock;
use dispatch2::{DispatchQueue, DispatchQueueAttr, DispatchRetained};
use objc2::rc::Retained;
use objc2::runtime::{NSObject, NSObjectProtocol, ProtocolObject};
use objc2::{AnyThread, DefinedClass, define_class, msg_send};
use objc2_foundation::{NSArray, NSData, NSError, NSString, NSURL};
use objc2_virtualization::{
    VZBridgedNetworkDeviceAttachment, VZBridgedNetworkInterface, VZDirectorySharingDeviceConfiguration,
    VZDiskImageCachingMode, VZDiskImageStorageDeviceAttachment, VZDiskImageSynchronizationMode, VZEFIBootLoader,
    VZEFIVariableStore, VZEFIVariableStoreInitializationOptions, VZErrorCode, VZErrorDomain,
    VZFileSerialPortAttachment, VZGenericPlatformConfiguration, VZLinuxBootLoader, VZMACAddress, VZMacAuxiliaryStorage,
    VZMacGraphicsDeviceConfiguration, VZMacGraphicsDisplayConfiguration, VZMacHardwareModel, VZMacMachineIdentifier,
    VZMacOSBootLoader, VZMacPlatformConfiguration, VZNATNetworkDeviceAttachment, VZNetworkDevice,
    VZNetworkDeviceConfiguration, VZSerialPortConfiguration, VZSharedDirectory, VZSingleDirectoryShare,
    VZStorageDeviceConfiguration, VZUSBKeyboardConfiguration, VZUSBScreenCoordinatePointingDeviceConfiguration,
    VZVirtioBlockDeviceConfiguration, VZVirtioConsoleDeviceSerialPortConfiguration, VZVirtioEntropyDeviceConfiguration,
    VZVirtioFileSystemDeviceConfiguration, VZVirtioNetworkDeviceConfiguration,
    VZVirtioTraditionalMemoryBalloonDeviceConfiguration, VZVirtualMachine, VZVirtualMachineConfiguration,
    VZVirtualMachineDelegate,
};
use tokio::sync::{oneshot, watch};

use super::config::{Configuration, Disk, Display, Interface, Platform, Shared};
use super::helper::{Ended, Engine, EngineError};
use crate::spec::Spec;

/// Serves the process's main queue, for ever: the helper's own work is on other threads, which end the process.
pub fn main_loop() -> ! {
    dispatch2::dispatch_main()
}

/// Whether this host and this program can run guests: the framework is there, and the program is signed for it.
#[must_use]
pub fn is_supported() -> bool {
    // SAFETY: a class method without arguments or conditions.
    unsafe { VZVirtualMachine::isSupported() }
}

/// The host's interfaces to which guests can be bridged.
#[must_use]
pub fn bridged_interfaces() -> Vec<String> {
    // SAFETY: a class method without arguments or conditions; the interfaces that it gives are immutable.
    unsafe {
        VZBridgedNetworkInterface::networkInterfaces()
            .iter()
            .map(|interface| interface.identifier().to_string())
            .collect()
    }
}

/// Apple's framework, with one guest.
pub struct Apple {
    queue: DispatchRetained<DispatchQueue>,
    guest: Arc<Mutex<Option<Guest>>>,
    ended: watch::Sender<Option<Ended>>,
}

/// A guest, and who hears of it.
struct Guest {
    machine: Retained<VZVirtualMachine>,
    /// The machine keeps no hold of it.
    _delegate: Retained<Delegate>,
}

// SAFETY: what is inside is touched only by closures on the queue to which it belongs, and that queue runs one at a time. Only the
// pointers pass through other threads.
unsafe impl Send for Guest {}

impl Default for Apple {
    fn default() -> Self {
        Self {
            queue: DispatchQueue::new("dev.vmpod.machine", DispatchQueueAttr::SERIAL),
            guest: Arc::default(),
            ended: watch::Sender::new(None),
        }
    }
}

impl std::fmt::Debug for Apple {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Apple").finish_non_exhaustive()
    }
}

/// Answers once.
type Answer = oneshot::Sender<Result<(), EngineError>>;
type Completion = RcBlock<dyn Fn(*mut NSError)>;

/// A completion handler that passes on what it hears, the first time.
fn completion(answer: Answer) -> Completion {
    let answer = RefCell::new(Some(answer));
    RcBlock::new(move |error: *mut NSError| {
        // SAFETY: the framework passes null or an error that lives until we return.
        let result = unsafe { error.as_ref() }.map_or(Ok(()), |error| Err(engine_error(error)));
        if let Some(answer) = answer.borrow_mut().take() {
            answer.send(result).ok();
        }
    })
}

/// An error of the framework in words, with what is behind it: its own description alone says little.
fn words(error: &NSError) -> String {
    let mut text = error.localizedDescription().to_string();
    if let Some(reason) = error.localizedFailureReason() {
        let reason = reason.to_string();
        if !text.contains(&reason) {
            text = format!("{} {reason}", text.trim_end());
        }
    }
    for cause in &error.underlyingErrors() {
        text = format!("{text} ({} {}: {})", cause.domain(), cause.code(), cause.localizedDescription());
    }
    format!("{text} [{} {}]", error.domain(), error.code())
}

fn engine_error(error: &NSError) -> EngineError {
    // SAFETY: a constant of the framework.
    let domain = unsafe { VZErrorDomain };
    let limit = domain.is_some_and(|domain| error.domain().isEqualToString(domain))
        && error.code() == VZErrorCode::VirtualMachineLimitExceeded.0;
    if limit { EngineError::Limit(words(error)) } else { EngineError::Failed(words(error)) }
}

fn failed(error: &Retained<NSError>) -> EngineError {
    engine_error(error)
}

impl Apple {
    /// Runs something with the guest on its queue and waits for the answer.
    async fn with_guest(
        &self,
        work: impl FnOnce(&VZVirtualMachine, Answer) + Send + 'static,
    ) -> Result<(), EngineError> {
        let (answer, result) = oneshot::channel();
        let guest = Arc::clone(&self.guest);
        self.queue.exec_async(move || match &*guest.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(guest) => work(&guest.machine, answer),
            None => drop(answer.send(Err(EngineError::Failed("there is no guest".to_owned())))),
        });
        result.await.unwrap_or_else(|_| Err(EngineError::Failed("the framework didn't answer".to_owned())))
    }
}

#[async_trait]
impl Engine for Apple {
    async fn start(&self, _spec: &Spec, configuration: &Configuration) -> Result<(), EngineError> {
        if !is_supported() {
            return Err(EngineError::Failed(
                "this host can't run guests, or this program isn't signed with the entitlement \
                 com.apple.security.virtualization (`codesign -d --entitlements - PROGRAM` tells)"
                    .to_owned(),
            ));
        }
        let (answer, result) = oneshot::channel();
        let (configuration, guest, ended) = (configuration.clone(), Arc::clone(&self.guest), self.ended.clone());
        let queue = self.queue.clone();
        self.queue.exec_async(move || {
            let made = build(&configuration).map(|built| {
                // SAFETY: the configuration is valid, and we are on the queue that the machine gets.
                let machine =
                    unsafe { VZVirtualMachine::initWithConfiguration_queue(VZVirtualMachine::alloc(), &built, &queue) };
                let delegate = Delegate::new(ended);
                // SAFETY: on the machine's queue; the delegate is kept for as long as the machine.
                unsafe { machine.setDelegate(Some(ProtocolObject::from_ref(&*delegate))) };
                Guest { machine, _delegate: delegate }
            });
            match made {
                Err(error) => drop(answer.send(Err(error))),
                Ok(made) => {
                    let block = completion(answer);
                    // SAFETY: on the machine's queue, in the state Stopped.
                    unsafe { made.machine.startWithCompletionHandler(&block) };
                    *guest.lock().unwrap_or_else(PoisonError::into_inner) = Some(made);
                }
            }
        });
        result.await.unwrap_or_else(|_| Err(EngineError::Failed("the framework didn't answer".to_owned())))
    }

    async fn request_stop(&self) -> Result<(), EngineError> {
        self.with_guest(|machine, answer| {
            // SAFETY: on the machine's queue.
            let result = unsafe { machine.requestStopWithError() }.map_err(|error| failed(&error));
            answer.send(result).ok();
        })
        .await
    }

    async fn stop(&self) -> Result<(), EngineError> {
        let ended = self.ended.clone();
        let stopped = self
            .with_guest(|machine, answer| {
                // SAFETY: on the machine's queue.
                if unsafe { machine.canStop() } {
                    // SAFETY: on the machine's queue, in a state in which it can be stopped.
                    unsafe { machine.stopWithCompletionHandler(&completion(answer)) };
                } else {
                    answer.send(Err(EngineError::Failed("the guest can't be stopped now".to_owned()))).ok();
                }
            })
            .await;
        if stopped.is_ok() {
            // The delegate hears of guests that stop by themselves only.
            ended.send_if_modified(|ended| ended.is_none() && ended.replace(Ended::Stopped).is_none());
        }
        stopped
    }

    async fn pause(&self) -> Result<(), EngineError> {
        self.with_guest(|machine, answer| {
            // SAFETY: on the machine's queue; in a wrong state the handler gets an error.
            unsafe { machine.pauseWithCompletionHandler(&completion(answer)) };
        })
        .await
    }

    async fn resume(&self) -> Result<(), EngineError> {
        self.with_guest(|machine, answer| {
            // SAFETY: on the machine's queue; in a wrong state the handler gets an error.
            unsafe { machine.resumeWithCompletionHandler(&completion(answer)) };
        })
        .await
    }

    async fn ended(&self) -> Ended {
        let mut ended = self.ended.subscribe();
        let end = ended.wait_for(Option::is_some).await.ok().and_then(|ended| ended.clone());
        // We are its sender.
        end.unwrap_or(Ended::Stopped)
    }
}

define_class!(
    // SAFETY: NSObject has no rules for those who extend it, and this has no `Drop`.
    #[unsafe(super(NSObject))]
    #[name = "VmpodMachineDelegate"]
    #[ivars = watch::Sender<Option<Ended>>]
    struct Delegate;

    // SAFETY: nothing is wanted of it.
    unsafe impl NSObjectProtocol for Delegate {}

    // SAFETY: the methods have the protocol's signatures.
    unsafe impl VZVirtualMachineDelegate for Delegate {
        #[unsafe(method(guestDidStopVirtualMachine:))]
        fn guest_did_stop(&self, _machine: &VZVirtualMachine) {
            self.ivars().send_replace(Some(Ended::Stopped));
        }

        #[unsafe(method(virtualMachine:didStopWithError:))]
        fn did_stop_with_error(&self, _machine: &VZVirtualMachine, error: &NSError) {
            self.ivars().send_replace(Some(Ended::Failed(words(error))));
        }

        #[unsafe(method(virtualMachine:networkDevice:attachmentWasDisconnectedWithError:))]
        fn network_lost(&self, _machine: &VZVirtualMachine, _device: &VZNetworkDevice, error: &NSError) {
            tracing::warn!(error = words(error), "the guest's network was disconnected");
        }
    }
);

impl Delegate {
    fn new(ended: watch::Sender<Option<Ended>>) -> Retained<Self> {
        let this = Self::alloc().set_ivars(ended);
        // SAFETY: NSObject's own initializer.
        unsafe { msg_send![super(this), init] }
    }
}

/// The framework's configuration from ours, validated.
fn build(from: &Configuration) -> Result<Retained<VZVirtualMachineConfiguration>, EngineError> {
    // SAFETY: objects that are made here and used by this thread alone until they are given away; every setter copies or keeps what
    // it is given.
    unsafe {
        let made = VZVirtualMachineConfiguration::new();
        made.setCPUCount(from.cpus as usize);
        made.setMemorySize(from.memory);
        platform(&made, &from.platform)?;
        if let Some(display) = from.display {
            screen(&made, display);
        }
        let disks = from.disks.iter().map(storage).collect::<Result<Vec<_>, _>>()?;
        made.setStorageDevices(&NSArray::from_retained_slice(&disks));
        let networks = from.networks.iter().map(network).collect::<Result<Vec<_>, _>>()?;
        made.setNetworkDevices(&NSArray::from_retained_slice(&networks));
        made.setSerialPorts(&NSArray::from_retained_slice(&[console(&from.console)?]));
        let shares = from.shares.iter().map(share).collect::<Result<Vec<_>, _>>()?;
        made.setDirectorySharingDevices(&NSArray::from_retained_slice(&shares));
        let entropy = Retained::into_super(VZVirtioEntropyDeviceConfiguration::new());
        made.setEntropyDevices(&NSArray::from_retained_slice(&[entropy]));
        let balloon = Retained::into_super(VZVirtioTraditionalMemoryBalloonDeviceConfiguration::new());
        made.setMemoryBalloonDevices(&NSArray::from_retained_slice(&[balloon]));
        made.validateWithError().map_err(|error| failed(&error))?;
        Ok(made)
    }
}

/// # Safety
///
/// As [`build`].
unsafe fn platform(made: &VZVirtualMachineConfiguration, from: &Platform) -> Result<(), EngineError> {
    match from {
        Platform::Mac { hardware_model, machine_identifier, auxiliary_storage } => {
            // SAFETY: as the caller.
            unsafe {
                let platform = VZMacPlatformConfiguration::new();
                let model = VZMacHardwareModel::initWithDataRepresentation(
                    VZMacHardwareModel::alloc(),
                    &*data(hardware_model)?,
                )
                .ok_or_else(|| EngineError::Failed("the image's hardware model isn't one".to_owned()))?;
                if !model.isSupported() {
                    let why = "the image's hardware model isn't supported by this Mac and its macOS: the image is of a newer macOS";
                    return Err(EngineError::Failed(why.to_owned()));
                }
                platform.setHardwareModel(&model);
                let identifier = match machine_identifier {
                    None => VZMacMachineIdentifier::new(),
                    Some(text) => {
                        let this = VZMacMachineIdentifier::alloc();
                        VZMacMachineIdentifier::initWithDataRepresentation(this, &*data(text)?)
                            .ok_or_else(|| EngineError::Failed("the image's machine identifier isn't one".to_owned()))?
                    }
                };
                platform.setMachineIdentifier(&identifier);
                let storage =
                    VZMacAuxiliaryStorage::initWithURL(VZMacAuxiliaryStorage::alloc(), &*url(auxiliary_storage)?);
                platform.setAuxiliaryStorage(Some(&storage));
                made.setPlatform(&platform);
                made.setBootLoader(Some(&VZMacOSBootLoader::new()));
                let keyboard = Retained::into_super(VZUSBKeyboardConfiguration::new());
                made.setKeyboards(&NSArray::from_retained_slice(&[keyboard]));
                // A trackpad is for guests of macOS 13 and later; a tablet is understood by all.
                let pointer = Retained::into_super(VZUSBScreenCoordinatePointingDeviceConfiguration::new());
                made.setPointingDevices(&NSArray::from_retained_slice(&[pointer]));
            }
        }
        Platform::Efi { variables } => {
            // SAFETY: as the caller.
            unsafe {
                let loader = VZEFIBootLoader::new();
                let store = VZEFIVariableStore::alloc();
                let store = if variables.exists() {
                    VZEFIVariableStore::initWithURL(store, &*url(variables)?)
                } else {
                    let options = VZEFIVariableStoreInitializationOptions::empty();
                    VZEFIVariableStore::initCreatingVariableStoreAtURL_options_error(store, &*url(variables)?, options)
                        .map_err(|error| failed(&error))?
                };
                loader.setVariableStore(Some(&store));
                made.setPlatform(&VZGenericPlatformConfiguration::new());
                made.setBootLoader(Some(&loader));
            }
        }
        Platform::Kernel { kernel, initrd, cmdline } => {
            // SAFETY: as the caller.
            unsafe {
                let loader = VZLinuxBootLoader::initWithKernelURL(VZLinuxBootLoader::alloc(), &*url(kernel)?);
                if let Some(initrd) = initrd {
                    loader.setInitialRamdiskURL(Some(&*url(initrd)?));
                }
                loader.setCommandLine(&NSString::from_str(cmdline));
                made.setPlatform(&VZGenericPlatformConfiguration::new());
                made.setBootLoader(Some(&loader));
            }
        }
    }
    Ok(())
}

/// # Safety
///
/// As [`build`].
unsafe fn screen(made: &VZVirtualMachineConfiguration, display: Display) {
    let size = |pixels: u32| isize::try_from(pixels).unwrap_or(isize::MAX);
    // SAFETY: as the caller.
    unsafe {
        let screen = VZMacGraphicsDisplayConfiguration::initWithWidthInPixels_heightInPixels_pixelsPerInch(
            VZMacGraphicsDisplayConfiguration::alloc(),
            size(display.width),
            size(display.height),
            size(display.density),
        );
        let graphics = VZMacGraphicsDeviceConfiguration::new();
        graphics.setDisplays(&NSArray::from_retained_slice(&[screen]));
        made.setGraphicsDevices(&NSArray::from_retained_slice(&[Retained::into_super(graphics)]));
    }
}

/// A disk. The guest's flushes stay in the host's cache: a machine's disk is a throwaway clone that dies with its machine.
///
/// Caching is said to be on: left to itself, the framework has corrupted the disks of Linux guests under load.
fn storage(disk: &Disk) -> Result<Retained<VZStorageDeviceConfiguration>, EngineError> {
    // SAFETY: objects that are made here and used by this thread alone.
    unsafe {
        let attachment =
            VZDiskImageStorageDeviceAttachment::initWithURL_readOnly_cachingMode_synchronizationMode_error(
                VZDiskImageStorageDeviceAttachment::alloc(),
                &*url(&disk.path)?,
                disk.read_only,
                VZDiskImageCachingMode::Cached,
                VZDiskImageSynchronizationMode::None,
            )
            .map_err(|error| failed(&error))?;
        let device = VZVirtioBlockDeviceConfiguration::initWithAttachment(
            VZVirtioBlockDeviceConfiguration::alloc(),
            &attachment,
        );
        Ok(Retained::into_super(device))
    }
}

/// A directory of this host, which the guest may write.
fn share(from: &Shared) -> Result<Retained<VZDirectorySharingDeviceConfiguration>, EngineError> {
    // SAFETY: objects that are made here and used by this thread alone.
    unsafe {
        let tag = match &from.tag {
            Some(tag) => NSString::from_str(tag),
            None => VZVirtioFileSystemDeviceConfiguration::macOSGuestAutomountTag(),
        };
        VZVirtioFileSystemDeviceConfiguration::validateTag_error(&tag).map_err(|error| failed(&error))?;
        let device =
            VZVirtioFileSystemDeviceConfiguration::initWithTag(VZVirtioFileSystemDeviceConfiguration::alloc(), &tag);
        let directory = VZSharedDirectory::initWithURL_readOnly(VZSharedDirectory::alloc(), &*url(&from.path)?, false);
        let single = VZSingleDirectoryShare::initWithDirectory(VZSingleDirectoryShare::alloc(), &directory);
        device.setShare(Some(&single));
        Ok(Retained::into_super(device))
    }
}

fn network(from: &Interface) -> Result<Retained<VZNetworkDeviceConfiguration>, EngineError> {
    // SAFETY: objects that are made here and used by this thread alone.
    unsafe {
        let device = VZVirtioNetworkDeviceConfiguration::new();
        match &from.bridged {
            None => device.setAttachment(Some(&VZNATNetworkDeviceAttachment::new())),
            Some(name) => {
                let all = VZBridgedNetworkInterface::networkInterfaces();
                let found = all.iter().find(|interface| interface.identifier().to_string() == *name);
                let interface = found.ok_or_else(|| no_interface(name, &bridged_interfaces()))?;
                let attachment = VZBridgedNetworkDeviceAttachment::initWithInterface(
                    VZBridgedNetworkDeviceAttachment::alloc(),
                    &interface,
                );
                device.setAttachment(Some(&attachment));
            }
        }
        let text = NSString::from_str(&from.mac.to_string());
        let address = VZMACAddress::initWithString(VZMACAddress::alloc(), &text)
            .ok_or_else(|| EngineError::Failed(format!("{} is no hardware address", from.mac)))?;
        device.setMACAddress(&address);
        Ok(Retained::into_super(device))
    }
}

fn no_interface(name: &str, all: &[String]) -> EngineError {
    EngineError::Failed(if all.is_empty() {
        "this program can't bridge guests: it isn't signed with the entitlement com.apple.vm.networking".to_owned()
    } else {
        format!("guests can't be bridged to {name}: there are {}", all.join(", "))
    })
}

fn console(path: &Path) -> Result<Retained<VZSerialPortConfiguration>, EngineError> {
    // SAFETY: objects that are made here and used by this thread alone.
    unsafe {
        let attachment = VZFileSerialPortAttachment::initWithURL_append_error(
            VZFileSerialPortAttachment::alloc(),
            &*url(path)?,
            true,
        )
        .map_err(|error| failed(&error))?;
        let port = VZVirtioConsoleDeviceSerialPortConfiguration::new();
        port.setAttachment(Some(&attachment));
        Ok(Retained::into_super(port))
    }
}

fn url(path: &Path) -> Result<Retained<NSURL>, EngineError> {
    let text = path.to_str().ok_or_else(|| EngineError::Failed(format!("{} isn't UTF-8", path.display())))?;
    Ok(NSURL::fileURLWithPath(&NSString::from_str(text)))
}

fn data(base64: &str) -> Result<Retained<NSData>, EngineError> {
    let bytes = BASE64_STANDARD
        .decode(base64.trim())
        .map_err(|error| EngineError::Failed(format!("the image's identity isn't base64: {error}")))?;
    Ok(NSData::with_bytes(&bytes))
}
