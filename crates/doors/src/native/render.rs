//! Replies for people: tables, timelines and sentences. Pure text in, text out.

use lodge_spec::Bytes;
use lodge_spec::state::{Event, Summary};
use serde_json::Value;

/// Columns as wide as their widest cell, two spaces between them.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> =
            cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    let mut text = line(head.to_vec());
    for row in rows {
        text += &line(row.iter().map(String::as_str).collect());
    }
    text
}

pub fn machines(list: &[Summary]) -> String {
    let dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let rows: Vec<Vec<String>> = list
        .iter()
        .map(|m| {
            let state = if m.ready { format!("{} (ready)", m.state) } else { m.state.to_string() };
            let runs = m.backend.zip(m.accel).map(|(b, a)| format!("{b}/{a}"));
            let memory = Bytes(m.memory_bytes).to_string();
            let why: Option<String> = m.reason.as_ref().map(|r| r.chars().take(60).collect());
            vec![
                m.name.to_string(),
                state,
                dash(runs),
                m.cpus.to_string(),
                memory,
                dash(m.address.clone()),
                why.unwrap_or_default(),
            ]
        })
        .collect();
    table(&["NAME", "STATE", "RUNS ON", "CPUS", "MEMORY", "ADDRESS", ""], &rows)
}

pub fn images(list: &[Value]) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let rows: Vec<Vec<String>> = list
        .iter()
        .map(|image| {
            let disk = &image["disk"];
            let digest: String = text(&disk["sha256"]).chars().take(12).collect();
            let boots = if image["kernel"].is_null() { "firmware" } else { "kernel" };
            let size = disk["virtual_bytes"].as_u64().unwrap_or(0);
            let size = format!("{:.1} GB", size as f64 / 1e9);
            vec![text(&image["name"]), digest, size, boots.into(), text(&image["created_at"])]
        })
        .collect();
    table(&["NAME", "DIGEST", "SIZE", "BOOTS BY", "CREATED"], &rows)
}

/// `2026-01-31 12:00:00.123` of microseconds since 1970, UTC.
pub fn clock(us: i64) -> String {
    let (days, rest) = (us.div_euclid(86_400_000_000), us.rem_euclid(86_400_000_000));
    // Civil date from days, after Howard Hinnant's well-known derivation.
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + i64::from(month <= 2);
    let ms = rest / 1000;
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02}.{:03}",
        ms / 3_600_000,
        ms / 60_000 % 60,
        ms / 1000 % 60,
        ms % 1000
    )
}

pub fn event(event: &Event) -> String {
    let Event { at_us, name, kind, detail, .. } = event;
    format!("{}  {name}  {kind}  {detail}\n", clock(*at_us)).replace("  \n", "\n")
}

/// Moments of the last start, in milliseconds from its request.
pub fn timeline(events: &[Event]) -> String {
    let Some(start) = events.first() else { return "it was never started\n".into() };
    let mut text = String::new();
    let mut before = start.at_us;
    for event in events {
        let (since, step) = (event.at_us - start.at_us, event.at_us - before);
        let (since, step) = (since as f64 / 1000.0, step as f64 / 1000.0);
        let detail: String = event.detail.chars().take(70).collect();
        let line = format!("{since:>10.1} ms  +{step:>8.1}  {:<14} {detail}", event.kind);
        text += &format!("{}\n", line.trim_end());
        before = event.at_us;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_civil() {
        assert_eq!(clock(0), "1970-01-01 00:00:00.000");
        assert_eq!(clock(951_782_400_000_000), "2000-02-29 00:00:00.000");
        assert_eq!(clock(1_795_174_459_123_456), "2026-11-20 11:34:19.123");
    }

    #[test]
    fn tables_line_up() {
        let rows = [vec!["a".to_owned(), "bcd".to_owned()], vec!["efgh".to_owned(), String::new()]];
        assert_eq!(table(&["X", "Y"], &rows), "X     Y\na     bcd\nefgh\n");
    }
}
