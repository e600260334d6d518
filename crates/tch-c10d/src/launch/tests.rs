use super::*;

fn launch(variables: &[(&str, &str)]) -> Result<Launch> {
    Launch::from_variables(|name| {
        variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
    })
}

/// The variable and the value that an error names.
fn refused(variables: &[(&str, &str)]) -> (&'static str, Option<String>) {
    match launch(variables) {
        Err(Error::Environment { variable, found, .. }) => (variable, found),
        other => panic!("{variables:?}: {other:?}"),
    }
}

fn at(host: &str, port: u16, served: bool, restarts: u64) -> Option<StoreAddress> {
    Some(StoreAddress { host: host.into(), port, served, restarts })
}

const BY_HAND: [(&str, &str); 5] = [
    ("RANK", "1"),
    ("WORLD_SIZE", "4"),
    ("LOCAL_RANK", "1"),
    ("MASTER_ADDR", "10.0.0.7"),
    ("MASTER_PORT", "1234"),
];

/// `BY_HAND` with one variable changed, or taken away.
fn by_hand_but(
    name: &'static str,
    value: Option<&'static str>,
) -> Vec<(&'static str, &'static str)> {
    let kept = BY_HAND.into_iter().filter(|(key, _)| *key != name);
    kept.chain(value.map(|value| (name, value))).collect()
}

#[test]
fn no_variable_is_one_process() {
    assert_eq!(launch(&[]).unwrap(), Launch::alone());
    assert_eq!(launch(&[("MASTER_ADDR", "x"), ("LOCAL_RANK", "3")]).unwrap(), Launch::alone());
}

#[test]
fn set_by_hand() {
    let found = launch(&BY_HAND).unwrap();
    assert_eq!((found.rank(), found.world_size(), found.local_rank().unwrap()), (1, 4, 1));
    assert_eq!(found.store, at("10.0.0.7", 1234, false, 0));
    assert!(!found.store().unwrap().is_loopback());
    for host in ["127.0.0.1", "localhost", "::1", "127.3.2.1"] {
        let found = launch(&by_hand_but("MASTER_ADDR", Some(host))).unwrap();
        assert!(found.store().unwrap().is_loopback(), "{host}");
    }
}

#[test]
fn local_rank_is_missed_when_it_is_asked_for() {
    let found = launch(&by_hand_but("LOCAL_RANK", None)).unwrap();
    assert!(matches!(
        found.local_rank(),
        Err(Error::Environment { variable: "LOCAL_RANK", found: None, .. })
    ));
}

#[test]
fn one_process_needs_no_meeting_place() {
    assert_eq!(launch(&[("RANK", "0"), ("WORLD_SIZE", "1")]).unwrap(), Launch::alone());
}

#[test]
fn torchrun_serves_the_store_and_counts_restarts() {
    let agent = [("TORCHELASTIC_USE_AGENT_STORE", "True"), ("TORCHELASTIC_RESTART_COUNT", "3")];
    let found = launch(&[BY_HAND.as_slice(), &agent].concat()).unwrap();
    assert_eq!(found.store, at("10.0.0.7", 1234, true, 3));
    assert_eq!((found.restarts(), Launch::alone().restarts()), (3, 0));
    let own = [("TORCHELASTIC_USE_AGENT_STORE", "False"), ("TORCHELASTIC_RESTART_COUNT", "2")];
    let found = launch(&[BY_HAND.as_slice(), &own].concat()).unwrap();
    assert_eq!(found.store, at("10.0.0.7", 1234, false, 2));
    let bad = [("TORCHELASTIC_RESTART_COUNT", "often")];
    let refused = refused(&[BY_HAND.as_slice(), &bad].concat());
    assert_eq!(refused, ("TORCHELASTIC_RESTART_COUNT", Some("often".into())));
}

#[test]
fn openmpi_on_one_machine_and_on_several() {
    let mut variables = vec![
        ("OMPI_COMM_WORLD_RANK", "2"),
        ("OMPI_COMM_WORLD_SIZE", "4"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
    ];
    let found = launch(&variables).unwrap();
    assert_eq!((found.rank(), found.world_size(), found.local_rank().unwrap()), (2, 4, 0));
    assert_eq!(found.store, at("127.0.0.1", 29500, false, 0));
    variables[3].1 = "2";
    assert_eq!(refused(&variables), ("MASTER_ADDR", None));
    variables.extend([("MASTER_ADDR", "head"), ("MASTER_PORT", "777")]);
    assert_eq!(launch(&variables).unwrap().store, at("head", 777, false, 0));
    variables[1].1 = "two";
    assert_eq!(refused(&variables), ("OMPI_COMM_WORLD_SIZE", Some("two".into())));
    assert_eq!(refused(&variables[..1]), ("OMPI_COMM_WORLD_SIZE", None));
    assert_eq!(refused(&[("OMPI_COMM_WORLD_SIZE", "4")]), ("OMPI_COMM_WORLD_RANK", None));
}

#[test]
fn slurm_meets_on_its_first_node() {
    let mut variables = vec![
        ("SLURM_PROCID", "5"),
        ("SLURM_NTASKS", "8"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_NODELIST", "gpu[07-08,11]"),
    ];
    let found = launch(&variables).unwrap();
    assert_eq!((found.rank(), found.world_size(), found.local_rank().unwrap()), (5, 8, 1));
    assert_eq!(found.store, at("gpu07", 29500, false, 0));
    assert_eq!(refused(&variables[..3]), ("MASTER_ADDR", None));
    variables.push(("SLURM_STEP_NODELIST", "gpu11"));
    assert_eq!(launch(&variables).unwrap().store, at("gpu11", 29500, false, 0));
    variables.push(("MASTER_ADDR", "head"));
    assert_eq!(launch(&variables).unwrap().store, at("head", 29500, false, 0));
    variables[2].1 = "-1";
    assert_eq!(refused(&variables), ("SLURM_LOCALID", Some("-1".into())));
    // A batch script without tasks: one process.
    assert_eq!(launch(&[("SLURM_PROCID", "0")]).unwrap(), Launch::alone());
}

#[test]
fn plain_variables_win_over_the_launcher_around_them() {
    let around = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "2"), ("OMPI_COMM_WORLD_RANK", "0")];
    assert_eq!(launch(&[BY_HAND.as_slice(), &around].concat()).unwrap(), launch(&BY_HAND).unwrap());
}

#[test]
fn bad_values_are_named() {
    for (name, value) in [
        ("RANK", "first"),
        ("RANK", "-1"),
        ("RANK", "4"),
        ("RANK", ""),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "1.5"),
        ("LOCAL_RANK", "gpu0"),
        ("MASTER_ADDR", ""),
        ("MASTER_PORT", "0"),
        ("MASTER_PORT", "65536"),
        ("MASTER_PORT", "http"),
    ] {
        assert_eq!(refused(&by_hand_but(name, Some(value))), (name, Some(value.into())));
    }
    for name in ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"] {
        assert_eq!(refused(&by_hand_but(name, None)), (name, None));
    }
}

#[test]
fn arguments_are_checked() {
    let what = |result| match result {
        Err(Error::Argument { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(what(Launch::new(2, 2, "127.0.0.1", 1)), "rank");
    assert_eq!(what(Launch::new(0, 0, "127.0.0.1", 1)), "rank");
    assert_eq!(what(Launch::new(0, 2, "", 1)), "host");
    assert_eq!(what(Launch::new(0, 2, "127.0.0.1", 0)), "port");
    assert_eq!(Launch::new(1, 2, "a", 9).unwrap().store, at("a", 9, false, 0));
}

#[test]
fn first_hosts() {
    for (nodes, first) in [
        ("a", "a"),
        ("a,b", "a"),
        ("n[1-3]", "n1"),
        ("n[007,9]", "n007"),
        ("n[2,4-5],m", "n2"),
        ("r[1-2]-x,m", "r1-x"),
        ("a-1,b[1-2]", "a-1"),
    ] {
        assert_eq!(first_host(nodes), first, "{nodes}");
    }
}
