//! The server's own certificate authority and the certificates it signs.
//!
//! Everything is kept in one directory (0700, keys 0600) and reused by the next start. What comes
//! near its end, or was made for other names, is made anew; the authority itself lives ten years.

use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::Timestamp;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

/// How many groups (organisations) a certificate can name.
const MOST_GROUPS: usize = 2;
/// How long the authority lives.
const CA_LIFE: Duration = Duration::from_hours(10 * 365 * 24);
/// How long a certificate signed by it lives.
const LEAF_LIFE: Duration = Duration::from_hours(365 * 24);
/// A certificate with less than this to live is replaced.
const RENEW_BEFORE: Duration = Duration::from_hours(30 * 24);
/// Clocks differ: a certificate is valid from a little before it was made.
const BACKDATE: Duration = Duration::from_mins(5);

/// Why a certificate couldn't be made or read.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file couldn't be read or written.
    #[error("can't {verb} {}", path.display())]
    File {
        /// `read` or `write`.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// A file holds something else than it should.
    #[error("{} is not a usable {what}; remove it to have a new one made", path.display())]
    Content {
        /// What it should be.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// A certificate couldn't be made.
    #[error("can't make a certificate for {subject}")]
    Make {
        /// Whose certificate.
        subject: String,
        /// The cause.
        source: rcgen::Error,
    },
    /// A certificate holds few groups.
    #[error("a certificate for {subject} can name at most {MOST_GROUPS} groups")]
    Groups {
        /// Whose certificate.
        subject: String,
    },
    /// A certificate signing request can't be used.
    #[error("the certificate signing request is not usable: {why}")]
    Request {
        /// What is wrong with it.
        why: String,
    },
}

/// A certificate and its key, as PEM.
#[derive(Clone)]
pub struct Issued {
    /// The certificate chain, PEM.
    pub cert_pem: String,
    /// The private key, PKCS#8 PEM. Keep it secret.
    pub key_pem: String,
}

impl std::fmt::Debug for Issued {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Issued").field("cert_pem", &self.cert_pem).finish_non_exhaustive()
    }
}

/// The server's own certificate authority.
pub struct Pki {
    dir: PathBuf,
    ca_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl std::fmt::Debug for Pki {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pki").field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// What a signed certificate may be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Usage {
    Client,
    Server,
}

impl Usage {
    fn purpose(self) -> ExtendedKeyUsagePurpose {
        match self {
            Self::Client => ExtendedKeyUsagePurpose::ClientAuth,
            Self::Server => ExtendedKeyUsagePurpose::ServerAuth,
        }
    }
}

/// Makes a directory that only its owner can enter, and its parents.
pub(crate) fn private_dir(dir: &Path) -> Result<(), PkiError> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|source| PkiError::File {
        verb: "make",
        path: dir.into(),
        source,
    })
}

/// Writes a file whole, readable by its owner only.
pub(crate) fn write_private(path: &Path, content: &str) -> Result<(), PkiError> {
    let fail = |source| PkiError::File { verb: "write", path: path.into(), source };
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".new");
    let new = path.with_file_name(name);
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(fail(error)),
        _ => {}
    }
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new).map_err(fail)?;
    file.write_all(content.as_bytes()).map_err(fail)?;
    file.sync_all().map_err(fail)?;
    std::fs::rename(&new, path).map_err(fail)?;
    if let Some(parent) = path.parent() {
        std::fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(fail)?;
    }
    Ok(())
}

pub(crate) fn read_if_there(path: &Path) -> Result<Option<String>, PkiError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(PkiError::File { verb: "read", path: path.into(), source }),
    }
}

fn params(
    subject: &str,
    groups: &[String],
    sans: &[String],
    life: Duration,
) -> Result<CertificateParams, rcgen::Error> {
    let mut params = CertificateParams::new(sans.to_vec())?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    // A name holds one value of each type here; the organisation's identifier, spelled out, is another type.
    let places = [DnType::OrganizationName, DnType::CustomDnType(vec![2, 5, 4, 10])];
    for (place, group) in places.into_iter().zip(groups) {
        params.distinguished_name.push(place, group.as_str());
    }
    params.distinguished_name.push(DnType::CommonName, subject);
    set_life(&mut params, life);
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn set_life(params: &mut CertificateParams, life: Duration) {
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let now = Duration::from_secs(u64::try_from(Timestamp::now().as_second()).unwrap_or_default());
    params.not_before = epoch + now.saturating_sub(BACKDATE);
    params.not_after = epoch + now + life;
}

/// When a PEM certificate ends.
pub(crate) fn expiry(pem: &str) -> Option<Timestamp> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    let (_, cert) = x509_parser::parse_x509_certificate(&der).ok()?;
    Timestamp::from_second(cert.validity().not_after.timestamp()).ok()
}

/// Whether a PEM certificate should be replaced by now.
pub(crate) fn near_end(pem: &str) -> bool {
    let soon = Timestamp::now().saturating_add(jiff::SignedDuration::try_from(RENEW_BEFORE).unwrap_or_default());
    expiry(pem).is_none_or(|end| soon.is_ok_and(|soon| end < soon))
}

impl Pki {
    /// Reads the authority from `dir`, or makes it.
    pub(crate) fn open(dir: &Path) -> Result<Self, PkiError> {
        private_dir(dir)?;
        let (cert, key) = (dir.join("ca.crt"), dir.join("ca.key"));
        if let (Some(ca_pem), Some(key_pem)) = (read_if_there(&cert)?, read_if_there(&key)?) {
            let pair = KeyPair::from_pem(&key_pem)
                .map_err(|_| PkiError::Content { what: "private key", path: key.clone() })?;
            let issuer = Issuer::from_ca_cert_pem(&ca_pem, pair)
                .map_err(|_| PkiError::Content { what: "certificate", path: cert.clone() })?;
            if !near_end(&ca_pem) {
                return Ok(Self { dir: dir.into(), ca_pem, issuer });
            }
        }
        let made = || -> Result<(String, String, Issuer<'static, KeyPair>), rcgen::Error> {
            let pair = KeyPair::generate()?;
            let mut params = params("vmpod", &[], &[], CA_LIFE)?;
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            params.key_usages =
                vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
            params.use_authority_key_identifier_extension = false;
            let cert = params.self_signed(&pair)?;
            let key_pem = pair.serialize_pem();
            Ok((cert.pem(), key_pem, Issuer::new(params, pair)))
        };
        let (ca_pem, key_pem, issuer) =
            made().map_err(|source| PkiError::Make { subject: "the authority".into(), source })?;
        write_private(&key, &key_pem)?;
        write_private(&cert, &ca_pem)?;
        Ok(Self { dir: dir.into(), ca_pem, issuer })
    }

    /// The authority's certificate, PEM.
    #[must_use]
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// A client certificate for user `cn` in `groups`, valid for a year.
    pub fn issue_client(&self, cn: &str, groups: &[String]) -> Result<Issued, PkiError> {
        self.issue(cn, groups, &[], Usage::Client)
    }

    /// A serving certificate for `cn`, valid for these host names and addresses, for a year.
    pub fn issue_serving(&self, cn: &str, sans: &[String]) -> Result<Issued, PkiError> {
        self.issue(cn, &[], sans, Usage::Server)
    }

    fn issue(&self, cn: &str, groups: &[String], sans: &[String], usage: Usage) -> Result<Issued, PkiError> {
        if groups.len() > MOST_GROUPS {
            return Err(PkiError::Groups { subject: cn.into() });
        }
        let made = || -> Result<Issued, rcgen::Error> {
            let pair = KeyPair::generate()?;
            let mut params = params(cn, groups, sans, LEAF_LIFE)?;
            params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
            params.extended_key_usages = vec![usage.purpose()];
            let cert: Certificate = params.signed_by(&pair, &self.issuer)?;
            Ok(Issued { cert_pem: cert.pem(), key_pem: pair.serialize_pem() })
        };
        made().map_err(|source| PkiError::Make { subject: cn.into(), source })
    }

    /// Signs a PKCS#10 request for one purpose; returns the certificate, PEM. The caller has
    /// checked who may have this subject.
    pub(crate) fn sign(&self, request_pem: &str, usage: Usage, life: Option<Duration>) -> Result<String, PkiError> {
        let bad = |error: rcgen::Error| PkiError::Request { why: error.to_string() };
        let mut request = CertificateSigningRequestParams::from_pem(request_pem).map_err(bad)?;
        request.params.is_ca = IsCa::NoCa;
        request.params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        request.params.extended_key_usages = vec![usage.purpose()];
        request.params.use_authority_key_identifier_extension = true;
        set_life(&mut request.params, life.unwrap_or(LEAF_LIFE).min(LEAF_LIFE));
        Ok(request.signed_by(&self.issuer).map_err(bad)?.pem())
    }

    /// The certificate kept as `NAME.crt`, made anew when it is absent, near its end, signed by
    /// another authority, or made for other names.
    pub(crate) fn kept_serving(&self, name: &str, cn: &str, sans: &[String]) -> Result<Issued, PkiError> {
        let (cert, key) = (self.dir.join(format!("{name}.crt")), self.dir.join(format!("{name}.key")));
        if let (Some(cert_pem), Some(key_pem)) = (read_if_there(&cert)?, read_if_there(&key)?)
            && !near_end(&cert_pem)
            && self.made_for(&cert_pem, sans)
            && KeyPair::from_pem(&key_pem).is_ok()
        {
            return Ok(Issued { cert_pem, key_pem });
        }
        let issued = self.issue_serving(cn, sans)?;
        write_private(&key, &issued.key_pem)?;
        write_private(&cert, &issued.cert_pem)?;
        Ok(issued)
    }

    fn made_for(&self, cert_pem: &str, sans: &[String]) -> bool {
        let check = || -> Option<bool> {
            let der = CertificateDer::from_pem_slice(cert_pem.as_bytes()).ok()?;
            let ca = CertificateDer::from_pem_slice(self.ca_pem.as_bytes()).ok()?;
            let (_, cert) = x509_parser::parse_x509_certificate(&der).ok()?;
            let (_, ca) = x509_parser::parse_x509_certificate(&ca).ok()?;
            cert.verify_signature(Some(ca.public_key())).ok()?;
            let wanted = CertificateParams::new(sans.to_vec()).ok()?.subject_alt_names;
            let found = cert.subject_alternative_name().ok()??;
            let has = |san: &SanType| {
                found.value.general_names.iter().any(|name| match (san, name) {
                    (SanType::DnsName(a), x509_parser::extensions::GeneralName::DNSName(b)) => a.as_str() == *b,
                    (SanType::IpAddress(a), x509_parser::extensions::GeneralName::IPAddress(b)) => match a {
                        std::net::IpAddr::V4(a) => a.octets() == **b,
                        std::net::IpAddr::V6(a) => a.octets() == **b,
                    },
                    _ => false,
                })
            };
            Some(wanted.iter().all(has))
        };
        check().unwrap_or(false)
    }
}

/// The certificate chain and key of PEM texts, for rustls.
pub(crate) fn chain_and_key(issued: &Issued) -> Option<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let chain: Vec<_> = CertificateDer::pem_slice_iter(issued.cert_pem.as_bytes()).collect::<Result<_, _>>().ok()?;
    let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).ok()?;
    (!chain.is_empty()).then_some((chain, key))
}

/// The user (CN) and groups (O) of a verified client certificate.
pub(crate) fn subject(der: &CertificateDer<'_>) -> Option<(String, Vec<String>)> {
    let (_, cert) = x509_parser::parse_x509_certificate(der).ok()?;
    subject_of(cert.subject())
}

/// The user and groups of a PEM certificate.
pub(crate) fn subject_of_pem(pem: &str) -> Option<(String, Vec<String>)> {
    subject(&CertificateDer::from_pem_slice(pem.as_bytes()).ok()?)
}

/// The user (CN) and groups (O) of a name. A name with several CNs, or with a part that can't be
/// read, has none: its readers could disagree on who it is.
pub(crate) fn subject_of(name: &x509_parser::x509::X509Name<'_>) -> Option<(String, Vec<String>)> {
    let mut users = name.iter_common_name();
    let user = users.next()?.as_str().ok()?.to_owned();
    let groups: Vec<String> =
        name.iter_organization().map(|group| group.as_str().map(str::to_owned)).collect::<Result<_, _>>().ok()?;
    (users.next().is_none() && !user.is_empty()).then_some((user, groups))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_reused_and_its_files_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let sans = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let first = Pki::open(dir.path()).unwrap();
        let serving = first.kept_serving("serving", "kube-apiserver", &sans).unwrap();
        let second = Pki::open(dir.path()).unwrap();
        assert_eq!(first.ca_pem(), second.ca_pem());
        assert_eq!(second.kept_serving("serving", "kube-apiserver", &sans).unwrap().cert_pem, serving.cert_pem);
        let more = [sans.clone(), vec!["vm.example".into()]].concat();
        assert_ne!(second.kept_serving("serving", "kube-apiserver", &more).unwrap().cert_pem, serving.cert_pem);
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            use std::os::unix::fs::PermissionsExt as _;
            assert_eq!(entry.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn client_certificates_name_user_and_groups() {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::open(dir.path()).unwrap();
        let issued = pki.issue_client("system:node:n1", &["system:nodes".into(), "b".into()]).unwrap();
        let (chain, _) = chain_and_key(&issued).unwrap();
        assert_eq!(subject(&chain[0]).unwrap(), ("system:node:n1".into(), vec!["system:nodes".into(), "b".into()]));
        assert!(!near_end(&issued.cert_pem));
    }

    #[test]
    fn signs_requests_for_one_purpose_only() {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::open(dir.path()).unwrap();
        let pair = KeyPair::generate().unwrap();
        let mut asked = CertificateParams::default();
        asked.distinguished_name.push(DnType::CommonName, "system:node:n1");
        let request = asked.serialize_request(&pair).unwrap();
        let pem = pki.sign(&request.pem().unwrap(), Usage::Client, None).unwrap();
        let der = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        let (_, cert) = x509_parser::parse_x509_certificate(&der).unwrap();
        let usage = cert.extended_key_usage().unwrap().unwrap().value.clone();
        assert!(usage.client_auth && !usage.server_auth);
        assert!(pki.sign("nonsense", Usage::Client, None).is_err());
    }
}
