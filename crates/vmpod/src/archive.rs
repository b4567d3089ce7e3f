//! `vmpod api export` and `import`: the API's objects as YAML.

use std::io::Read as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::Value;
use vmpod_apiserver::{ApiServer, Options, archive};

use crate::args::ApiCommand;
use crate::client;
use crate::home::{self, Home, Role};
use crate::output::{self, talk};
use crate::report::{Exit, Remedy};

/// Saves or restores.
pub(crate) async fn run(home: &Home, command: ApiCommand) -> Result<Exit> {
    match command {
        ApiCommand::Export { file } => export(home, file.as_deref()).await,
        ApiCommand::Import { file } => import(home, &file).await,
    }
}

/// The API on the store of a home that nobody runs.
async fn open(home: &Home) -> Result<ApiServer> {
    let options = Options { dir: home.api(), listen: None, extra_sans: Vec::new() };
    ApiServer::open(options).await.context("can't open the API's store")
}

async fn export(home: &Home, file: Option<&Path>) -> Result<Exit> {
    let text = if home.holder()?.is_some() {
        archive::to_yaml(ask(&client::connect(home).await?).await?)?
    } else if home.api().join("store.redb").exists() {
        let _lock = home.lock(Role::Up).await?;
        open(home).await?.export()?
    } else {
        return Err(Remedy::new(
            format!("the home {} has no API store", home.root().display()),
            "name the home of a `vmpod up` with --home or VMPOD_HOME",
        )
        .into());
    };
    match file {
        None => output::data(&text)?,
        Some(file) => {
            let file = std::path::absolute(file).with_context(|| format!("can't make {} absolute", file.display()))?;
            home::write_private(&file, &text)?;
            talk(&format!("the API's objects are in {}, secrets included", file.display()));
        }
    }
    Ok(Exit::Done)
}

/// Every object of an API, in the order in which they can be made.
async fn ask(client: &kube::Client) -> Result<Vec<Value>> {
    let mut kinds = Vec::new();
    let core = client.list_core_api_resources("v1").await.context("can't ask the API what it serves")?;
    kinds.extend(core.resources.into_iter().map(|one| ("api/v1".to_owned(), "v1".to_owned(), one)));
    let groups = client.list_api_groups().await.context("can't ask the API what it serves")?;
    for group in groups.groups {
        let version = group.preferred_version.or_else(|| group.versions.first().cloned());
        let Some(version) = version.map(|version| version.group_version) else { continue };
        let listed = client.list_api_group_resources(&version).await;
        let listed = listed.with_context(|| format!("can't ask the API for the kinds of {version}"))?;
        kinds.extend(listed.resources.into_iter().map(|one| (format!("apis/{version}"), version.clone(), one)));
    }
    let place =
        |version: &str, plural: &str| archive::place(version.split_once('/').map_or("", |(group, _)| group), plural);
    kinds.retain(|(_, version, kind)| {
        // What can't be created is only answered, as metrics are, and no archive's business.
        let can = |wanted: &str| kind.verbs.iter().any(|verb| verb == wanted);
        !kind.name.contains('/') && can("list") && can("create") && place(version, &kind.name).is_some()
    });
    kinds.sort_by_key(|(_, version, kind)| place(version, &kind.name));
    let mut objects = Vec::new();
    for (path, version, kind) in kinds {
        let request = kube::core::Request::new(format!("/{path}/{}", kind.name));
        let request = request.list(&kube::api::ListParams::default()).context("can't ask for a list")?;
        let mut list: Value =
            client.request(request).await.with_context(|| format!("can't list the API's {}", kind.name))?;
        for mut object in list["items"].as_array_mut().map(std::mem::take).unwrap_or_default() {
            // The items of a list leave out what the list says.
            object["apiVersion"] = version.clone().into();
            object["kind"] = kind.kind.clone().into();
            objects.push(object);
        }
    }
    Ok(objects)
}

async fn import(home: &Home, file: &Path) -> Result<Exit> {
    let mut text = String::new();
    if file == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).context("can't read the archive from standard input")?;
    } else {
        text = std::fs::read_to_string(file).with_context(|| format!("can't read the archive {}", file.display()))?;
    }
    if let Some(holder) = home.holder()? {
        return Err(Remedy::new(
            format!(
                "the home {} is in use by `vmpod {}` (process {})",
                home.root().display(),
                holder.role.word(),
                holder.pid
            ),
            "stop it, import, and start it again: nobody may see an import by half",
        )
        .into());
    }
    home.make()?;
    let _lock = home.lock(Role::Up).await?;
    let count = open(home).await?.import(&text).await?;
    talk(&format!("{count} objects are in the API's store; the next `vmpod up` serves them"));
    Ok(Exit::Done)
}
