//! A real registry: Debian's docker-registry on a loopback port.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::process::{Child, Command};

use crate::prerequisites::{program, scratch};

const PATIENCE: Duration = Duration::from_mins(1);
/// Who may use a secure one.
pub const USER: &str = "ci";
/// And the password.
pub const PASSWORD: &str = "open sesame";
/// bcrypt of [`PASSWORD`].
const HTPASSWD: &str = "$2y$05$abcdefghijklmnopqrstuupx2xBUC4954936wVIjyyPHmUBFu0wCW";

/// A registry that ends with the test.
#[derive(Debug)]
pub struct Registry {
    /// Its host and port.
    pub host: String,
    dir: tempfile::TempDir,
    _child: Child,
}

impl Registry {
    /// Starts it: without TLS and open to all, or with TLS and a password.
    pub async fn start(secure: bool) -> Result<Self> {
        let binary = program("docker-registry", "docker-registry")?;
        let dir = tempfile::Builder::new().prefix("image-").tempdir_in(scratch()?)?;
        let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let host = format!("127.0.0.1:{port}");
        let at = |name: &str| dir.path().join(name);
        let mut config = format!(
            "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
             storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp:\n  addr: {host}\n",
            at("data").display()
        );
        if secure {
            certificates(dir.path())?;
            std::fs::write(at("htpasswd"), format!("{USER}:{HTPASSWD}\n"))?;
            let (certificate, key, passwords) = (at("server.pem"), at("server.key"), at("htpasswd"));
            let secured = format!(
                "  tls: {{certificate: {}, key: {}}}\nauth: {{htpasswd: {{realm: test, path: {}}}}}\n",
                certificate.display(),
                key.display(),
                passwords.display()
            );
            config.push_str(&secured);
        }
        std::fs::write(at("config.yml"), config)?;
        let log = std::fs::File::create(at("log"))?;
        let child = Command::new(binary)
            .arg("serve")
            .arg(at("config.yml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .kill_on_drop(true)
            .spawn()?;
        let registry = Self { host, dir, _child: child };
        let listens = async {
            while tokio::net::TcpStream::connect(&registry.host).await.is_err() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(PATIENCE, listens).await.with_context(|| {
            format!(
                "the registry doesn't listen: {}",
                std::fs::read_to_string(registry.path("log")).unwrap_or_default()
            )
        })?;
        Ok(registry)
    }

    /// A file of its directory, which goes with it.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// `ca.pem`, and a server's certificate by it.
fn certificates(dir: &Path) -> Result<()> {
    let ca_key = rcgen::KeyPair::generate()?;
    let mut ca = rcgen::CertificateParams::default();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    ca.distinguished_name.push(rcgen::DnType::CommonName, "test authority");
    std::fs::write(dir.join("ca.pem"), ca.self_signed(&ca_key)?.pem())?;
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate()?;
    let server = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()])?.signed_by(&key, &issuer)?;
    std::fs::write(dir.join("server.pem"), server.pem())?;
    std::fs::write(dir.join("server.key"), key.serialize_pem())?;
    Ok(())
}
