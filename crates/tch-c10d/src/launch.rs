//! How this process was started: its rank among how many, and where they meet.

use std::fmt;
use std::net::IpAddr;

use crate::{Error, Result};

/// The port of rank 0 where a launcher names none, as in PyTorch.
const DEFAULT_PORT: u16 = 29500;

/// The place of this process among those that were started together.
///
/// # Example
/// ```
/// # use tch_c10d::Launch;
/// let launch = Launch::from_variables(|name| match name {
///     "RANK" => Some("1".into()),
///     "WORLD_SIZE" => Some("2".into()),
///     "MASTER_ADDR" => Some("10.0.0.7".into()),
///     "MASTER_PORT" => Some("29500".into()),
///     _ => None,
/// })?;
/// assert_eq!((launch.rank(), launch.world_size()), (1, 2));
/// # Ok::<(), tch_c10d::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    rank: usize,
    world_size: usize,
    local_rank: Option<usize>,
    store: Option<StoreAddress>,
}

/// Where the processes of a launch meet: a key-value store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoreAddress {
    pub(crate) host: String,
    pub(crate) port: u16,
    /// Whether the launcher serves the store itself; else rank 0 does.
    pub(crate) served: bool,
    /// How often the launcher has restarted the processes.
    pub(crate) restarts: u64,
}

impl fmt::Display for StoreAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl StoreAddress {
    /// Whether the host is this machine and so, as it is every rank's, the only one.
    pub(crate) fn is_loopback(&self) -> bool {
        self.host == "localhost"
            || self.host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
    }
}

impl Launch {
    /// One process on its own.
    #[must_use]
    pub fn alone() -> Self {
        Self { rank: 0, world_size: 1, local_rank: Some(0), store: None }
    }

    /// Process `rank` of `world_size`, which meet at a port that rank 0 opens on `host`.
    ///
    /// # Errors
    /// [`Error::Argument`] for a `rank` not below `world_size`, an empty `host` or a port 0.
    pub fn new(rank: usize, world_size: usize, host: &str, port: u16) -> Result<Self> {
        let argument =
            |what, expected: String, found: String| Error::Argument { what, expected, found };
        if rank >= world_size {
            return Err(argument("rank", format!("a number below {world_size}"), rank.to_string()));
        }
        if host.is_empty() {
            return Err(argument("host", "a name or an address".into(), "an empty text".into()));
        }
        if port == 0 {
            return Err(argument("port", "a number from 1 to 65535".into(), "0".into()));
        }
        let store = StoreAddress { host: host.into(), port, served: false, restarts: 0 };
        Ok(Self { rank, world_size, local_rank: None, store: Some(store) })
    }

    /// Reads the variables of torchrun, `mpirun` or `srun` from the environment, as
    /// [`Launch::from_variables`] does.
    ///
    /// # Errors
    /// [`Error::Environment`] that names the variable.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(|name| {
            std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
        })
    }

    /// Reads a launcher's variables from `variable`. The first launcher whose variables are there counts:
    ///
    /// | launcher | rank, number of processes, rank on the machine | meeting place |
    /// |---|---|---|
    /// | torchrun, or set by hand | `RANK`, `WORLD_SIZE`, `LOCAL_RANK` | `MASTER_ADDR`, `MASTER_PORT`, both required |
    /// | OpenMPI | `OMPI_COMM_WORLD_RANK`, `_SIZE`, `_LOCAL_RANK` | `MASTER_ADDR`, else this machine if it has all ranks; `MASTER_PORT`, else 29500 |
    /// | SLURM's `srun` | `SLURM_PROCID`, `SLURM_NTASKS`, `SLURM_LOCALID` | `MASTER_ADDR`, else the first host of `SLURM_STEP_NODELIST` or `SLURM_NODELIST`; `MASTER_PORT`, else 29500 |
    /// | none | one process on its own | |
    ///
    /// `LOCAL_RANK` may be missing where nobody asks for it. One process needs no meeting place. With
    /// `TORCHELASTIC_USE_AGENT_STORE=True` torchrun serves the store; `TORCHELASTIC_RESTART_COUNT` keeps
    /// what a previous attempt left in it apart.
    ///
    /// SLURM sets its variables in a batch script too: a program that the script starts without `srun` waits
    /// for ranks that do not exist, unless `RANK=0 WORLD_SIZE=1` stands before it.
    ///
    /// # Errors
    /// [`Error::Environment`] that names the variable, for one that is missing or cannot be read.
    pub fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let read = Variables(&variable);
        let has = |name| variable(name).is_some();
        if has("RANK") || has("WORLD_SIZE") {
            let (rank, world_size) = read.place("RANK", "WORLD_SIZE")?;
            let local_rank = read.optional("LOCAL_RANK", "a number")?;
            let store = || read.store(read.text("MASTER_ADDR")?, read.port()?);
            Self::read(rank, world_size, local_rank, store)
        } else if has("OMPI_COMM_WORLD_RANK") || has("OMPI_COMM_WORLD_SIZE") {
            let (rank, world_size) = read.place("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")?;
            let local_rank = read.optional("OMPI_COMM_WORLD_LOCAL_RANK", "a number")?;
            let here: Option<usize> = read.optional("OMPI_COMM_WORLD_LOCAL_SIZE", "a number")?;
            let store = || {
                let host = match read.text("MASTER_ADDR") {
                    Err(_) if here == Some(world_size) => "127.0.0.1".to_owned(),
                    host => host?,
                };
                read.store(host, read.port_or_default()?)
            };
            Self::read(rank, world_size, local_rank, store)
        } else if has("SLURM_PROCID") && has("SLURM_NTASKS") {
            let (rank, world_size) = read.place("SLURM_PROCID", "SLURM_NTASKS")?;
            let local_rank = read.optional("SLURM_LOCALID", "a number")?;
            let store = || {
                let nodes = variable("SLURM_STEP_NODELIST").or_else(|| variable("SLURM_NODELIST"));
                let host = match (read.text("MASTER_ADDR"), nodes) {
                    (Err(_), Some(nodes)) if !nodes.is_empty() => first_host(&nodes),
                    (host, _) => host?,
                };
                read.store(host, read.port_or_default()?)
            };
            Self::read(rank, world_size, local_rank, store)
        } else {
            Ok(Self::alone())
        }
    }

    fn read(
        rank: usize,
        world_size: usize,
        local_rank: Option<usize>,
        store: impl FnOnce() -> Result<StoreAddress>,
    ) -> Result<Self> {
        if world_size == 1 {
            return Ok(Self { local_rank: Some(local_rank.unwrap_or(0)), ..Self::alone() });
        }
        Ok(Self { rank, world_size, local_rank, store: Some(store()?) })
    }

    /// The number of this process, from 0.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of processes.
    #[must_use]
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// The number of this process on its machine, from 0: which GPU it should take.
    ///
    /// # Errors
    /// [`Error::Environment`] if the launcher did not say: set `LOCAL_RANK`.
    pub fn local_rank(&self) -> Result<usize> {
        self.local_rank
            .ok_or_else(|| missing("LOCAL_RANK", "the number of this process on its machine"))
    }

    /// How often the launcher has restarted the processes: what one does but once is done already, if not 0.
    #[must_use]
    pub fn restarts(&self) -> u64 {
        self.store.as_ref().map_or(0, |store| store.restarts)
    }

    pub(crate) fn store(&self) -> Option<&StoreAddress> {
        self.store.as_ref()
    }
}

/// Reads numbers and texts, and names the variable where it cannot.
struct Variables<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Variables<'_> {
    fn optional<T: std::str::FromStr>(
        &self,
        name: &'static str,
        expected: &str,
    ) -> Result<Option<T>> {
        let Some(value) = (self.0)(name) else { return Ok(None) };
        match value.trim().parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(Error::Environment {
                variable: name,
                expected: expected.into(),
                found: Some(value),
            }),
        }
    }

    fn number(&self, name: &'static str, expected: &str) -> Result<usize> {
        self.optional(name, expected)?.ok_or_else(|| missing(name, expected))
    }

    fn place(&self, rank: &'static str, size: &'static str) -> Result<(usize, usize)> {
        let world_size = self.number(size, "a number of processes, at least 1")?;
        if world_size == 0 {
            let expected = "a number of processes, at least 1".into();
            return Err(Error::Environment { variable: size, expected, found: Some("0".into()) });
        }
        let expected = format!("a number below {size}={world_size}");
        let number = self.number(rank, &expected)?;
        if number >= world_size {
            return Err(Error::Environment {
                variable: rank,
                expected,
                found: Some(number.to_string()),
            });
        }
        Ok((number, world_size))
    }

    fn text(&self, name: &'static str) -> Result<String> {
        let value = (self.0)(name).map(|value| value.trim().to_owned());
        match value {
            Some(value) if !value.is_empty() => Ok(value),
            found => Err(Error::Environment {
                variable: name,
                expected: "the name or address of rank 0's machine".into(),
                found,
            }),
        }
    }

    fn port(&self) -> Result<u16> {
        let expected = "a port, from 1 to 65535";
        match self.optional("MASTER_PORT", expected)? {
            Some(0) => Err(Error::Environment {
                variable: "MASTER_PORT",
                expected: expected.into(),
                found: Some("0".into()),
            }),
            Some(port) => Ok(port),
            None => Err(missing("MASTER_PORT", expected)),
        }
    }

    fn port_or_default(&self) -> Result<u16> {
        match self.port() {
            Err(Error::Environment { found: None, .. }) => Ok(DEFAULT_PORT),
            port => port,
        }
    }

    fn store(&self, host: String, port: u16) -> Result<StoreAddress> {
        let name = "TORCHELASTIC_RESTART_COUNT";
        let restarts = self.optional(name, "a number of restarts")?.unwrap_or(0);
        let served = (self.0)("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
        Ok(StoreAddress { host, port, served, restarts })
    }
}

fn missing(variable: &'static str, expected: &str) -> Error {
    Error::Environment { variable, expected: expected.into(), found: None }
}

/// The first host of SLURM's list: `node[07-10,12],login` begins with `node07`.
fn first_host(nodes: &str) -> String {
    let end = nodes.find([',', '[']).unwrap_or(nodes.len());
    let (name, rest) = nodes.split_at(end);
    let Some(numbers) = rest.strip_prefix('[') else { return name.to_owned() };
    let first = numbers.split([',', '-', ']']).next().unwrap_or_default();
    // What follows the bracket belongs to the name: `rack[1-2]-a`.
    let tail = numbers.split_once(']').map_or("", |(_, tail)| tail);
    let tail = tail.split(',').next().unwrap_or_default();
    format!("{name}{first}{tail}")
}

#[cfg(test)]
mod tests;
