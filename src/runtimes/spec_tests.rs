//! The promises of `spec`: golden verdicts over the sample runtimes, and bad input.

use super::*;

macro_rules! sample {
    ($name:literal) => {
        (
            $name,
            include_str!(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/tests/data/vineyardruntime/",
                $name,
                ".yaml"
            )),
        )
    };
}

fn verdict(text: &str) -> Vec<String> {
    match parse(text.as_bytes()) {
        Ok(specs) => specs
            .iter()
            .map(|spec| {
                format!(
                    "{} memory={} rpc_port={} metrics={}",
                    spec.id, spec.memory, spec.rpc_port, spec.metrics
                )
            })
            .collect(),
        Err(SpecError::Fields(errors)) => errors.iter().map(ToString::to_string).collect(),
        Err(error) => vec![error.to_string()],
    }
}

/// A runtime with these fields beneath `spec`.
fn with(spec: &str) -> String {
    format!(
        "{{apiVersion: data.fluid.io/v1alpha1, kind: VineyardRuntime, \
         metadata: {{name: v}}, spec: {spec}}}"
    )
}

/// A runtime with these fields in its first level.
fn with_level(level: &str) -> String {
    with(&format!("{{tieredstore: {{levels: [{level}]}}}}"))
}

#[test]
fn sample_runtimes_get_their_verdicts() {
    const SPILL: &str =
        "spec.tieredstore.levels[1]: not supported yet: memory alone, level 0, can be used";
    const HIGH: &str = "spec.tieredstore.levels[0].high: not supported yet";
    const LOW: &str = "spec.tieredstore.levels[0].low: not supported yet";
    const MASTER_NETWORK: &str = "spec.master.networkMode: not supported yet";
    const WORKER_NETWORK: &str = "spec.worker.networkMode: not supported yet";
    for ((name, text), want) in [
        (
            sample!("doc-minimal"),
            vec!["default/vineyard memory=21474836480 rpc_port=9600 metrics=true"],
        ),
        (
            sample!("long-name"),
            vec![
                "team-research-alpha/vineyard-runtime-with-a-rather-long-name-0001 \
                 memory=1073741824 rpc_port=9600 metrics=true",
            ],
        ),
        (
            sample!("no-tieredstore"),
            vec![
                "spec.tieredstore.levels: a level is required, as in [{mediumtype: MEM, quota: 4Gi}]",
            ],
        ),
        (
            sample!("doc-fuse-cache"),
            vec!["spec.fuse.options: not supported yet"],
        ),
        (
            sample!("container-network"),
            vec![
                MASTER_NETWORK,
                "spec.fuse.networkMode: not supported yet",
                WORKER_NETWORK,
            ],
        ),
        (
            sample!("external-etcd"),
            vec![
                "spec.master.endpoint: not supported yet",
                "spec.master.resources: not supported yet",
                "spec.fuse.resources: not supported yet",
                "spec.fuse.env: not supported yet",
                "spec.fuse.cleanPolicy: not supported yet",
                "spec.worker.resources: not supported yet",
            ],
        ),
        (
            sample!("mem-omitted"),
            vec![
                "spec.volumes: not supported yet",
                MASTER_NETWORK,
                WORKER_NETWORK,
                "spec.worker.resources: not supported yet",
                "spec.worker.volumeMounts: not supported yet",
            ],
        ),
        (
            sample!("requests-no-limits"),
            vec![
                MASTER_NETWORK,
                WORKER_NETWORK,
                "spec.worker.resources: not supported yet",
            ],
        ),
        (
            sample!("spill-hostpath"),
            vec![
                MASTER_NETWORK,
                WORKER_NETWORK,
                "spec.worker.options: not supported yet",
                SPILL,
                HIGH,
                LOW,
            ],
        ),
        (sample!("proposal-spill-hostpath"), vec![SPILL, HIGH, LOW]),
        (sample!("proposal-spill-pvc"), vec![SPILL, HIGH, LOW]),
        (
            sample!("proposal-full"),
            vec![
                "spec.master.enabled: not supported yet",
                "spec.master.replicas: not supported yet",
                "spec.master.image: not supported yet",
                "spec.master.imagePullPolicy: not supported yet",
                "spec.master.imageTag: not supported yet",
                "spec.master.ports: not supported yet",
                "spec.fuse.image: not supported yet",
                "spec.fuse.imagePullPolicy: not supported yet",
                "spec.fuse.imageTag: not supported yet",
                "spec.worker.image: not supported yet",
                "spec.worker.imagePullPolicy: not supported yet",
                "spec.worker.imageTag: not supported yet",
                "spec.worker.properties: not supported yet",
            ],
        ),
        (
            sample!("counter-proposal-cheyang"),
            vec![
                "spec.volumes: not supported yet",
                "spec.master.replicas: not supported yet",
                "spec.master.options: not supported yet",
                "spec.master.ports: not supported yet",
                "spec.master.volumeMounts: not supported yet",
                "spec.fuse.image: not supported yet",
                "spec.fuse.imagePullPolicy: not supported yet",
                "spec.fuse.imageTag: not supported yet",
                "spec.fuse.cleanPolicy: not supported yet",
                "spec.worker.image: not supported yet",
                "spec.worker.imagePullPolicy: not supported yet",
                "spec.worker.imageTag: not supported yet",
                "spec.worker.volumeMounts: not supported yet",
                "spec.worker.options: not supported yet",
                "spec.worker.ports.port: no such field",
                SPILL,
                HIGH,
                LOW,
                "spec.tieredstore.levels[0].quota: \"2GB\" is not a quantity: Kubernetes has no \
                 suffix \"GB\"; G (10^9) or Gi (2^30) is wanted",
            ],
        ),
    ] {
        assert_eq!(verdict(text), want, "{name}");
    }
}

#[test]
fn what_is_accepted_is_obeyed() {
    let text = with(
        "{replicas: 3, disablePrometheus: true, worker: {replicas: 2, ports: {rpc: 9700}, env: {}}, \
         volumes: [], master: , \
         tieredstore: {levels: [{level: 0, mediumType: MEM, volumeType: hostPath, quota: 1048576}]}}",
    );
    assert_eq!(
        verdict(&text),
        ["default/v memory=1048576 rpc_port=9700 metrics=false"]
    );
}

#[test]
fn what_the_api_server_adds_is_no_obstacle() {
    let text = "
apiVersion: data.fluid.io/v1alpha1
kind: VineyardRuntime
metadata:
  name: vineyard
  namespace: ml
  labels: {a: b}
  annotations: {kubectl.kubernetes.io/last-applied-configuration: '{}'}
  creationTimestamp: '2026-01-01T00:00:00Z'
  finalizers: [vineyard-runtime-controller-finalizer]
  generation: 2
  managedFields: [{manager: kubectl}]
  ownerReferences: [{kind: Dataset}]
  resourceVersion: '17'
  uid: 5a6e
spec:
  tieredstore: {levels: [{mediumtype: MEM, quota: 1Gi, volumeType: hostPath}]}
status: {phase: Ready}
";
    assert_eq!(
        verdict(text),
        ["ml/vineyard memory=1073741824 rpc_port=9600 metrics=true"]
    );
}

#[test]
fn a_quota_is_a_positive_size() {
    const AT: &str = "spec.tieredstore.levels[0].quota";
    for (quota, want) in [
        (
            "0",
            "\"0\" is no memory at all: a size such as 4Gi is wanted",
        ),
        (
            "'0'",
            "\"0\" is no memory at all: a size such as 4Gi is wanted",
        ),
        (
            "0Gi",
            "\"0Gi\" is no memory at all: a size such as 4Gi is wanted",
        ),
        ("-1", "\"-1\" is negative: a size is at least 0"),
        ("-4Gi", "\"-4Gi\" is negative: a size is at least 0"),
        (
            "4Gib",
            "\"4Gib\" is not a quantity: Kubernetes has no suffix \"Gib\"; Gi is wanted",
        ),
        ("1.5", "a size is wanted here, as in 4Gi, not 1.5"),
        ("[4Gi]", "a size is wanted here, as in 4Gi, not a list"),
        ("true", "a size is wanted here, as in 4Gi, not true"),
    ] {
        let text = with_level(&format!("{{mediumtype: MEM, quota: {quota}}}"));
        assert_eq!(verdict(&text), [format!("{AT}: {want}")], "{quota}");
    }
    assert_eq!(
        verdict(&with_level("{mediumtype: MEM}")),
        [format!("{AT}: a size is required, as in 4Gi")]
    );
}

#[test]
fn every_wrong_field_is_told_at_once() {
    let text = "
apiVersion: data.fluid.io/v1alpha1
kind: VineyardRuntime
metadata: {name: My_Runtime, nmaespace: ml}
spec:
  wroker: {}
  replicas: -1
  disablePrometheus: 'yes'
  worker: {ports: {rpc: '9600'}}
  tieredstore: {levels: [{mediumtype: SSD, mediumType: MEM, level: 3, volumeType: Hostpath, quoto: 4Gi}]}
";
    assert_eq!(
        verdict(text),
        [
            "metadata.nmaespace: no such field; did you mean namespace?",
            "metadata.name: \"My_Runtime\" is not a Kubernetes name: lower-case letters, digits and \
             '-' are wanted, beginning and ending with a letter or digit, at most 63 characters",
            "spec.wroker: no such field; did you mean worker?",
            "spec.replicas: a whole number from 0 to 2147483647 is wanted here, not -1",
            "spec.worker.ports.rpc: a whole number from 1 to 65535 is wanted here, not the text \"9600\"",
            "spec.tieredstore.levels[0].quoto: no such field; did you mean quota?",
            "spec.tieredstore.levels[0].level: a whole number from 0 to 0 is wanted here, not 3",
            "spec.tieredstore.levels[0].mediumType: mediumtype is there already; one of the two is wanted",
            "spec.tieredstore.levels[0].mediumtype: MEM is wanted for level 0, not the text \"SSD\"",
            "spec.tieredstore.levels[0].volumeType: hostPath or emptyDir is wanted here, not the text \"Hostpath\"",
            "spec.tieredstore.levels[0].quota: a size is required, as in 4Gi",
            "spec.disablePrometheus: true or false is wanted here, not the text \"yes\"",
        ]
    );
}

#[test]
fn another_object_is_told_by_its_kind_alone() {
    assert_eq!(
        verdict("{apiVersion: v1, kind: ConfigMap, data: {a: b}}"),
        [
            "apiVersion: data.fluid.io/v1alpha1 is wanted here, not the text \"v1\"",
            "kind: VineyardRuntime is wanted here, not the text \"ConfigMap\"",
        ]
    );
    assert_eq!(
        verdict("{a: b}"),
        [
            "apiVersion: data.fluid.io/v1alpha1 is wanted here",
            "kind: VineyardRuntime is wanted here",
        ]
    );
    assert_eq!(
        verdict("just text"),
        ["kind: a VineyardRuntime is wanted here, not the text \"just text\""]
    );
    assert_eq!(
        verdict(&with("").replace("{name: v}", "{}")),
        [
            "metadata.name: a name is required",
            "spec.tieredstore.levels: a level is required, as in [{mediumtype: MEM, quota: 4Gi}]",
        ]
    );
}

#[test]
fn each_document_is_a_runtime_and_all_of_them_count() {
    let one = with_level("{mediumtype: MEM, quota: 1Gi}");
    let two = one.replace("name: v", "name: w");
    assert_eq!(
        verdict(&format!("---\n{one}\n---\n{two}\n---\n")),
        [
            "default/v memory=1073741824 rpc_port=9600 metrics=true",
            "default/w memory=1073741824 rpc_port=9600 metrics=true",
        ]
    );
    assert_eq!(
        verdict(&format!("{one}\n---\n{one}")),
        ["document 2: metadata.name: default/v is in this file already"]
    );
    assert_eq!(
        verdict(&format!("{one}\n---\n{}", two.replace("1Gi", "0"))),
        [
            "document 2: spec.tieredstore.levels[0].quota: \"0\" is no memory at all: a size such as 4Gi is wanted"
        ]
    );
}

#[test]
fn what_is_not_yaml_is_told_by_line_and_column() {
    assert_eq!(
        verdict("apiVersion: data.fluid.io/v1alpha1\nkind: [VineyardRuntime\nspec: {"),
        [
            "line 3, column 5: did not find expected ',' or ']', while parsing a flow sequence at line 2 column 7"
        ]
    );
    assert_eq!(
        verdict("apiVersion: v1\nspec:\n\treplicas: 1\n"),
        [
            "line 3, column 1: found character that cannot start any token, while scanning for the next token"
        ]
    );
    for empty in ["", "\n", "# a comment\n", "---\n", "---\n---\n"] {
        assert_eq!(
            verdict(empty),
            ["the file holds no VineyardRuntime"],
            "{empty:?}"
        );
    }
}

#[test]
fn a_key_that_comes_twice_is_refused() {
    assert_eq!(
        verdict("apiVersion: a\nkind: b\nspec:\n  replicas: 1\n  replicas: 2\n"),
        ["line 4, column 3: spec: duplicate entry with key \"replicas\""]
    );
}

#[test]
fn hostile_files_are_refused() {
    assert_eq!(
        parse(&vec![b' '; FILE_LIMIT + 1]),
        Err(SpecError::TooLarge(FILE_LIMIT + 1))
    );
    assert_eq!(parse(b"ab\xff"), Err(SpecError::NotText(2)));
    let bomb: String = std::iter::once("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned())
        .chain((1..12).map(|i| {
            let before = format!("*a{}, ", i - 1).repeat(10);
            format!("a{i}: &a{i} [{}]\n", before.trim_end_matches(", "))
        }))
        .collect();
    let [refused] = verdict(&bomb).try_into().unwrap();
    assert!(refused.ends_with("repetition limit exceeded"), "{refused}");
    let [deep] = verdict(&"[".repeat(10_000)).try_into().unwrap();
    assert!(deep.contains("recursion limit exceeded"), "{deep}");
}
