//! `list` and `lookup`: filters, columns and order. Pure over machines as `get` shows them.

use std::cmp::Ordering;

use regex_lite::{Regex, RegexBuilder};
use serde_json::Value;

use super::grammar::{Lookup, Table};
use super::properties::{COLUMNS, DISK_COLUMNS, NIC_COLUMNS};
use super::values::{Object, mac, text_of};
use super::view::short_type;

enum Test {
    Equal(String),
    Like(Regex),
}

struct Filter {
    key: String,
    test: Test,
}

/// Machines with the short form of their type, as lists and filters see them.
pub(super) fn shortened(vms: Vec<Object>) -> Vec<Object> {
    let shorten = |mut vm: Object| {
        let short = short_type(&vm);
        vm.insert("type".into(), short.into());
        vm
    };
    vms.into_iter().map(shorten).collect()
}

/// Whether a name is a column, and under which heading and width.
fn column(name: &str, wildcard: bool) -> Option<(String, usize)> {
    if let Some((_, heading, width)) = COLUMNS.iter().find(|(known, _, _)| *known == name) {
        return Some(((*heading).to_owned(), *width));
    }
    let parts: Vec<&str> = name.splitn(3, '.').collect();
    let index = |text: &str| (text == "*" && wildcard) || text.parse::<usize>().is_ok();
    let known = match parts.as_slice() {
        ["tags" | "customer_metadata" | "internal_metadata", ..] => {
            name.split_once('.').is_some_and(|(_, key)| !key.is_empty())
        }
        ["disks", at, field] => index(at) && DISK_COLUMNS.contains(field),
        ["nics", at, field] => index(at) && NIC_COLUMNS.contains(field),
        _ => false,
    };
    known.then(|| (name.to_uppercase(), 20))
}

/// The values that a name has in a machine; more than one where it says `*`.
fn values<'a>(vm: &'a Object, name: &str) -> Vec<&'a Value> {
    let parts: Vec<&str> = name.splitn(3, '.').collect();
    match parts.as_slice() {
        [map @ ("tags" | "customer_metadata" | "internal_metadata"), ..] if parts.len() > 1 => {
            let key = &name[map.len() + 1..];
            vm.get(*map).and_then(|map| map.get(key)).into_iter().collect()
        }
        [list @ ("disks" | "nics"), at, field] => {
            let items = vm.get(*list).and_then(Value::as_array).into_iter().flatten();
            let items = items.enumerate().filter(|(i, _)| *at == "*" || i.to_string() == *at);
            items.filter_map(|(_, item)| item.get(*field)).collect()
        }
        _ => vm.get(name).into_iter().collect(),
    }
}

fn filters(pairs: &[(String, String)], what: &str) -> Result<Vec<Filter>, String> {
    let filter = |(key, value): &(String, String)| {
        column(key, true).ok_or_else(|| format!("Invalid {what} key: \"{key}\""))?;
        let test = match value.strip_prefix('~') {
            Some(pattern) => {
                let built = RegexBuilder::new(pattern).case_insensitive(true).build();
                let built = built.map_err(|e| format!("Invalid pattern \"{pattern}\": {e}"))?;
                Test::Like(built)
            }
            None if key.ends_with(".mac") => Test::Equal(mac(value).unwrap_or(value.clone())),
            None => Test::Equal(value.clone()),
        };
        Ok(Filter { key: key.clone(), test })
    };
    pairs.iter().map(filter).collect()
}

fn matches(vm: &Object, filter: &Filter) -> bool {
    values(vm, &filter.key).into_iter().filter_map(text_of).any(|text| match &filter.test {
        Test::Equal(wanted) => text == *wanted,
        Test::Like(regex) => regex.is_match(&text),
    })
}

fn select(vms: &[Object], filters: &[Filter]) -> Vec<Object> {
    let all = |vm: &&Object| filters.iter().all(|filter| matches(vm, filter));
    vms.iter().filter(all).cloned().collect()
}

/// The members of machines that a list looks at.
pub(super) fn members(table: &Table) -> Vec<&str> {
    let Table { columns, sort, filters, .. } = table;
    let named = columns.iter().chain(sort).flatten().map(String::as_str);
    let filtered = filters.iter().map(|(key, _)| key.as_str());
    let names = named.chain(filtered).map(|name| name.trim_start_matches(['-', '+']));
    let names = names.map(|name| name.split('.').next().unwrap_or(name));
    names.chain(["ram", "state", "alias"]).collect()
}

/// The text of `list`, its last line end included.
pub(super) fn list(vms: &[Object], table: &Table) -> Result<String, String> {
    let Table { parsable, header, columns, sort, .. } = table;
    let filters = filters(&table.filters, "filter")?;
    let words = |list: &[&str]| list.iter().map(|w| (*w).to_owned()).collect::<Vec<String>>();
    let names =
        columns.clone().unwrap_or_else(|| words(&["uuid", "type", "ram", "state", "alias"]));
    let mut headings = Vec::new();
    for name in &names {
        if name.contains('*') {
            return Err(format!("Invalid order key: \"{name}\""));
        }
        headings.push(column(name, false).ok_or_else(|| format!("invalid order field: {name}"))?);
    }
    let sort = sort.clone().unwrap_or_else(|| words(&["ram", "uuid"]));
    let mut order = Vec::new();
    for word in &sort {
        let name = word.trim_start_matches(['-', '+']);
        if name.contains('*') {
            return Err(format!("Invalid sort key: \"{name}\""));
        }
        column(name, false).ok_or_else(|| format!("invalid sort field: {name}"))?;
        order.push((name.to_owned(), word.starts_with('-')));
    }
    let mut found = select(vms, &filters);
    found.sort_by(|a, b| compare(a, b, &order));
    let mut text = String::new();
    if header.unwrap_or(!parsable) {
        let row: Vec<String> = headings.iter().map(|(heading, _)| heading.clone()).collect();
        text += &line(&row, &headings, *parsable);
    }
    for vm in &found {
        let row: Vec<String> = names.iter().map(|name| cell(vm, name, *parsable)).collect();
        text += &line(&row, &headings, *parsable);
    }
    Ok(text)
}

fn cell(vm: &Object, name: &str, parsable: bool) -> String {
    let value = values(vm, name).into_iter().next();
    let text = value.filter(|value| **value != false).and_then(text_of).unwrap_or_default();
    match (text.is_empty(), parsable) {
        (true, false) => "-".into(),
        (_, true) => text.replace(':', "\\:"),
        (false, false) => text,
    }
}

fn line(cells: &[String], headings: &[(String, usize)], parsable: bool) -> String {
    let joined = match parsable {
        true => cells.join(":"),
        false => {
            let padded = cells.iter().zip(headings);
            let padded: Vec<String> =
                padded.map(|(cell, (_, width))| format!("{cell:<width$}")).collect();
            padded.join("  ").trim_end().to_owned()
        }
    };
    format!("{joined}\n")
}

/// What is missing comes last in ascending order, first in descending.
fn compare(a: &Object, b: &Object, order: &[(String, bool)]) -> Ordering {
    for (name, descending) in order {
        let value = |vm| values(vm, name).into_iter().next().filter(|v| !v.is_null());
        let ordering = match (value(a), value(b)) {
            (None, None) => Ordering::Equal,
            (None, Some(_)) => Ordering::Greater,
            (Some(_), None) => Ordering::Less,
            (Some(a), Some(b)) => match (a.as_f64(), b.as_f64()) {
                (Some(a), Some(b)) => a.partial_cmp(&b).unwrap_or(Ordering::Equal),
                (_, _) => text_of(a).cmp(&text_of(b)),
            },
        };
        let ordering = if *descending { ordering.reverse() } else { ordering };
        if ordering != Ordering::Equal {
            return ordering;
        }
    }
    Ordering::Equal
}

/// The text of `lookup`.
pub(super) fn lookup(vms: &[Object], asked: &Lookup) -> Result<String, String> {
    let Lookup { json, unique, columns, filters: pairs } = asked;
    if columns.is_some() && !json {
        return Err("Cannot specify -o without -j".into());
    }
    let mut found = select(vms, &filters(pairs, "lookup")?);
    if *unique && found.len() != 1 {
        return Err(format!("Requested unique lookup but found {} results.", found.len()));
    }
    let uuid = |vm: &Object| vm.get("uuid").and_then(text_of).unwrap_or_default();
    if !json {
        return Ok(found.iter().map(|vm| uuid(vm) + "\n").collect());
    }
    if let Some(columns) = columns {
        for vm in &mut found {
            vm.retain(|name, _| columns.contains(name));
        }
    }
    let text = serde_json::to_string_pretty(&found).map_err(|e| e.to_string())?;
    Ok(text + "\n")
}

#[cfg(test)]
mod tests {
    use super::super::build::tests::object;
    use super::*;

    const U: &str = "b8ab5fc1-8576-45ef-bb51-9826b52a4651";

    fn vms() -> Vec<Object> {
        let one = object(&format!(
            r#"{{"uuid":"{U}","type":"KVM","ram":1024,"state":"stopped","autoboot":false,
            "nics":[{{"ip":"10.88.88.51","mac":"02:08:20:0a:0b:0c"}}],
            "tags":{{"bigbaddaboom":"multipass"}}}}"#
        ));
        let two = object(
            r#"{"uuid":"a0000000-0000-4000-8000-000000000000","type":"BHYVE","ram":2048,
            "state":"running","alias":"MyZone7","vcpus":0}"#,
        );
        shortened(vec![two, one])
    }

    fn pairs(text: &str) -> Vec<(String, String)> {
        let words = text.split(' ').filter(|word| !word.is_empty());
        let pairs = words.map(|word| word.split_once('=').unwrap_or((word, "")));
        pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
    }

    fn table(columns: &str, sort: &str, filters: &str) -> Table {
        let list =
            |text: &str| (!text.is_empty()).then(|| text.split(',').map(str::to_owned).collect());
        let filters = pairs(filters);
        Table { columns: list(columns), sort: list(sort), filters, ..Table::default() }
    }

    #[test]
    fn cases_70_71_72_rows() {
        let one = &vms()[1..];
        assert_eq!(
            list(one, &Table::default()).unwrap(),
            format!(
                "UUID                                  TYPE  RAM      STATE             ALIAS\n\
                 {U}  KVM   1024     stopped           -\n"
            )
        );
        let parsable = Table { parsable: true, ..Table::default() };
        assert_eq!(list(one, &parsable).unwrap(), format!("{U}:KVM:1024:stopped:\n"));
        let asked =
            Table { header: Some(false), ..table("uuid,autoboot,nics.0.ip,tags.x", "", "") };
        assert_eq!(list(one, &asked).unwrap(), format!("{U}  -         10.88.88.51           -\n"));
    }

    #[test]
    fn cases_73_74_and_order() {
        let why =
            |columns, sort, filters| list(&vms(), &table(columns, sort, filters)).unwrap_err();
        assert_eq!(why("nics.*.ip", "", ""), "Invalid order key: \"nics.*.ip\"");
        assert_eq!(why("", "nics.*.ip", ""), "Invalid sort key: \"nics.*.ip\"");
        assert_eq!(why("", "", "foo=1"), "Invalid filter key: \"foo\"");
        assert_eq!(why("foo", "", ""), "invalid order field: foo");
        assert_eq!(why("", "-foo", ""), "invalid sort field: foo");
        let order = |sort| {
            let rows = list(&vms(), &Table { header: Some(false), ..table("type", sort, "") });
            rows.unwrap().split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(order(""), ["KVM", "BHYV"]);
        assert_eq!(order("-ram"), ["BHYV", "KVM"]);
        assert_eq!(order("alias"), ["BHYV", "KVM"], "missing is last");
        assert_eq!(order("-alias"), ["KVM", "BHYV"], "missing is first");
    }

    #[test]
    fn cases_75_to_81_lookup() {
        let find = |filters: &str| {
            let asked = Lookup { filters: pairs(filters), ..Lookup::default() };
            lookup(&vms(), &asked).map(|text| text.lines().count())
        };
        assert_eq!(find("ram=1024"), Ok(1));
        assert_eq!(find("ram=102"), Ok(0));
        assert_eq!(find("ram=~^10"), Ok(1));
        assert_eq!(find("alias=~zone"), Ok(1));
        assert_eq!(find("nics.*.mac=2:8:20:a:b:c"), Ok(1));
        assert_eq!(find("tags.bigbaddaboom=multipass"), Ok(1));
        assert_eq!(find("type=BHYV"), Ok(1));
        assert_eq!(find("type=BHYVE"), Ok(0));
        assert_eq!(find("autoboot=false state=stopped"), Ok(1));
        assert_eq!(find("alias"), Ok(0));
        assert_eq!(find(""), Ok(2));
        for key in ["nics.*.ips", "disks.*.path", "vnc_port", "resolvers.0"] {
            assert_eq!(find(&format!("{key}=1")), Err(format!("Invalid lookup key: \"{key}\"")));
        }
        assert!(find("alias=~[").unwrap_err().contains("Invalid pattern \"[\""));
        let asked = |text: &str, json, unique, columns: Option<&str>| {
            let columns = columns.map(|c| vec![c.to_owned()]);
            lookup(&vms(), &Lookup { json, unique, columns, filters: pairs(text) })
        };
        let none = asked("alias=none", false, true, None);
        assert_eq!(none, Err("Requested unique lookup but found 0 results.".into()));
        let bare = asked("", false, false, Some("uuid"));
        assert_eq!(bare, Err("Cannot specify -o without -j".into()));
        assert_eq!(asked("uuid=none", true, false, None), Ok("[]\n".into()));
        let one = asked("ram=1024", true, true, Some("ram")).unwrap();
        assert_eq!(one, "[\n  {\n    \"ram\": 1024\n  }\n]\n");
    }
}
