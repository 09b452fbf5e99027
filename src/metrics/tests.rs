use super::*;

#[test]
fn what_was_observed_is_rendered() {
    let metrics = Metrics::new();
    metrics.observe_request("GET", "/v1/topics/{topic}", 200, Duration::from_millis(3));
    metrics.observe_produce(Duration::from_micros(150), 10, 1000);
    metrics.observe_fetch(None, 3, 30);
    metrics.observe_commit(Duration::from_millis(1));
    metrics.observe_entry(64, 65_000);
    metrics.count_event("leader_elected");
    metrics.set_group_lag("g", "orders", 2, 17);
    metrics.register_collector(|| {
        vec![
            ("queue_leaders", "Queues led", Sample::Gauge(4.0)),
            ("log_fsyncs", "fsyncs", Sample::Counter(9)),
        ]
    });
    let text = metrics.render().unwrap();
    for line in [
        "quorate_http_requests_total{method=\"GET\",route=\"/v1/topics/{topic}\",status=\"200\"} 1",
        "quorate_produced_messages_total 10",
        "quorate_produced_value_bytes_total 1000",
        "quorate_produce_duration_seconds_count 1",
        "quorate_fetched_messages_total 3",
        "quorate_fetch_duration_seconds_count 0",
        "quorate_commit_duration_seconds_count 1",
        "quorate_entry_messages_count 1",
        "quorate_events_total{event=\"leader_elected\"} 1",
        "quorate_group_lag_messages{group=\"g\",topic=\"orders\",queue=\"2\"} 17",
        "quorate_queue_leaders 4",
        "quorate_log_fsyncs_total 9",
    ] {
        assert!(text.contains(line), "no {line} in\n{text}");
    }
    let memory = text
        .lines()
        .find_map(|line| line.strip_prefix("quorate_process_resident_memory_bytes "))
        .unwrap();
    assert!(memory.parse::<f64>().unwrap() > 1e6);
}

#[test]
fn clients_cannot_create_series_without_end() {
    let metrics = Metrics::new();
    for i in 0..MAX_LAG_SERIES as u32 + 50 {
        metrics.set_group_lag("g", "t", i, 1);
    }
    let text = metrics.render().unwrap();
    let lines = text
        .lines()
        .filter(|line| line.starts_with("quorate_group_lag_messages{"));
    assert_eq!(lines.count(), MAX_LAG_SERIES);
    metrics.set_group_lag("g", "t", 0, 5);
    assert!(metrics.render().unwrap().contains("queue=\"0\"} 5"));
}
