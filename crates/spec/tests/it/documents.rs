//! Formats told apart by content, faults of shape reported together, the committed schema.

use expect_test::{expect, expect_file};
use lodge_spec::document;

#[test]
fn the_same_machine_in_three_formats() {
    let json = r#"{"name": "web", "cpus": 2, "memory": "1GiB", "disks": [{"size": "4GB"}]}"#;
    let yaml = "# a machine\nname: web\ncpus: 2\nmemory: 1GiB\ndisks:\n  - size: 4GB\n";
    let toml = "# a machine\nname = 'web'\ncpus = 2\nmemory = '1GiB'\n[[disks]]\nsize = '4GB'\n";
    let drafts = [json, yaml, toml].map(|text| document::parse(text).unwrap());
    assert_eq!(drafts[0], drafts[1]);
    assert_eq!(drafts[1], drafts[2]);
}

#[test]
fn every_fault_of_shape_is_reported_at_once() {
    let text = "nmae: web\ncpus: [1]\nmemory: true\nboot: {kernal: /k}\ndisks:\n- {siez: 1}\n- 7\n\
                zebra: 1\nports: [22, '1:2']\n";
    let problems = document::parse(text).unwrap_err();
    expect![[r#"
        boot.kernal: unknown field; did you mean `kernel`?
        cpus: a list is not a whole number or a group of fields
        disks[0].siez: unknown field; did you mean `size`?
        disks[1]: 7 is not a group of fields
        memory: true is not a whole number or a text or a group of fields
        nmae: unknown field; did you mean `name`?
        ports[0]: 22 is not a text or a group of fields
        zebra: unknown field"#]]
    .assert_eq(&problems.to_string());
}

#[test]
fn documents_that_are_none() {
    for (text, part) in [
        ("", "not a group of fields"),
        ("- 1\n", "not a group of fields"),
        ("{", "not JSON"),
        ("{\"name\": \"a\"} x", "not JSON"),
        ("a = = 1", "not TOML"),
        ("a: [", "not YAML"),
        ("name: a\nname: b\n", "not YAML"),
    ] {
        let problems = document::parse(text).unwrap_err().to_string();
        assert!(problems.contains(part), "{text:?}: {problems}");
    }
    let huge = format!("name: {}", "x".repeat(5 << 20));
    assert!(document::parse(&huge).unwrap_err().to_string().contains("larger than 4 MiB"));
}

#[test]
fn yaml_amplification_is_refused() {
    let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for i in 1..12 {
        let refs = vec![format!("*a{}", i - 1); 10].join(", ");
        text += &format!("a{i}: &a{i} [{refs}]\n");
    }
    assert!(document::parse(&text).is_err());
}

/// `UPDATE_EXPECT=1 cargo test -p lodge-spec` writes the file anew.
#[test]
fn the_committed_schema_is_current() {
    expect_file!["../../../../docs/machine.schema.json"].assert_eq(&document::schema_text());
}
