//! Figures in the Prometheus text exposition format 0.0.4. Pure.

use std::fmt::Write;

use crate::runtimes::RuntimeId;
use crate::shard::client::InstanceStatus;
use crate::supervisor::ChildReport;

/// A runtime, whether it is ready, and its shard's figures if it gave them.
pub(super) type Fares<'a> = (&'a RuntimeId, bool, Option<InstanceStatus>);

/// One metric's name, kind and meaning.
type About = (&'static str, &'static str, &'static str);

type Figure = fn(&InstanceStatus) -> u64;

const OF_SHARDS: [(About, Figure); 5] = [
    (
        (
            "instances_memory_usage_bytes",
            "gauge",
            "Bytes requested for the blobs in the store.",
        ),
        |status| status.memory_usage,
    ),
    (
        (
            "instances_memory_limit_bytes",
            "gauge",
            "Bytes that blobs may take together.",
        ),
        |status| status.memory_limit,
    ),
    (
        (
            "ipc_connection_total",
            "gauge",
            "Clients connected over the UNIX socket.",
        ),
        |status| status.ipc_connections,
    ),
    (
        (
            "rpc_connection_total",
            "gauge",
            "Clients connected over TCP.",
        ),
        |status| status.rpc_connections,
    ),
    (
        (
            "vinelet_deferred_requests",
            "gauge",
            "Requests that wait for a name or an object.",
        ),
        |status| status.deferred_requests,
    ),
];

/// How runtimes fare.
pub(super) fn runtimes(fares: &[Fares<'_>]) -> String {
    let mut text = String::new();
    about(
        &mut text,
        (
            "vinelet_runtime_ready",
            "gauge",
            "1 if the runtime can be published.",
        ),
    );
    for (id, is_ready, _) in fares {
        sample(
            &mut text,
            "vinelet_runtime_ready",
            "runtime",
            &id.to_string(),
            u64::from(*is_ready),
        );
    }
    for (metric, figure) in OF_SHARDS {
        about(&mut text, metric);
        for (id, _, status) in fares {
            if let Some(status) = status {
                sample(
                    &mut text,
                    metric.0,
                    "instance",
                    &id.to_string(),
                    figure(status),
                );
            }
        }
    }
    text
}

/// How the supervisor's children fare.
pub(super) fn children(reports: &[ChildReport]) -> String {
    let mut text = String::new();
    about(
        &mut text,
        (
            "vinelet_child_restarts_total",
            "counter",
            "Processes started after the first.",
        ),
    );
    for report in reports {
        sample(
            &mut text,
            "vinelet_child_restarts_total",
            "child",
            &report.name,
            report.restarts,
        );
    }
    text
}

fn about(text: &mut String, (name, kind, help): About) {
    // Writing to a String cannot fail.
    let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
}

/// Label values here are names of Kubernetes objects and of children: nothing to escape.
fn sample(text: &mut String, name: &str, label: &str, value: &str, figure: u64) {
    let _ = writeln!(text, "{name}{{{label}=\"{value}\"}} {figure}");
}
