//! The screen: seen by a viewer and in a picture, typed into, with and without a password.

use lodge_vm_tests::rfb::{Viewer, read_ppm};
use lodge_vm_tests::vmadm::Vmadm;
use lodge_vm_tests::{assets, need};

/// A boot loader that waits for somebody to type.
const ASKS: &str = "prompt 1\ntimeout 0\nsay TYPE A LETTER HERE\n";

fn address(v: &Vmadm, uuid: &str) -> String {
    let vnc = v.info(uuid, "vnc")["vnc"].clone();
    format!("{}:{}", vnc["host"].as_str().unwrap(), vnc["port"])
}

#[test]
fn a_viewer_sees_the_screen_and_types() {
    let iso = assets::bootable(&assets::shell(), ASKS);
    need!(iso.is_some(), "isolinux");
    let v = Vmadm::new();
    let uuid = v.create(r#"{"brand":"kvm","autoboot":false,"ram":512,"nics":[]}"#);
    v.bring(&uuid, &iso.unwrap(), "i.iso");
    v.ok(&["boot", &uuid, "order=d", "cdrom=/i.iso,ide"]);
    v.console(&uuid, "boot:");
    let at = address(&v, &uuid);
    let mut viewer = Viewer::connect(&at, None).unwrap();
    let lit = |picture: &[[u8; 3]]| picture.iter().filter(|p| p.iter().any(|c| *c > 60)).count();
    let begun = std::time::Instant::now();
    let mut seen = viewer.picture();
    while lit(&seen) < 500 {
        assert!(begun.elapsed().as_secs() < 60, "the screen stays dark");
        seen = viewer.picture();
    }
    assert_eq!(
        v.ok(&["sysrq", &uuid, "screenshot"]),
        format!("Sent screenshot sysrq to VM {uuid}")
    );
    let file = v.get(&uuid)["zonepath"].as_str().unwrap().to_owned() + "/root/tmp/vm.ppm";
    let (width, height, shot) = read_ppm(&std::fs::read(file).unwrap());
    let seen = viewer.picture();
    assert_eq!((width, height), (viewer.width, viewer.height));
    let other = shot.iter().zip(&seen).filter(|(a, b)| a != b).count();
    // The cursor blinks.
    assert!(other < 200, "{other} of {} places differ", seen.len());
    // A daemon that is killed takes no viewer with it, and the place stays.
    v.lab.kill_daemon();
    viewer.type_text("l\n");
    v.console(&uuid, "GUEST-READY");
    assert_eq!(address(&v, &uuid), at);
    assert!(Viewer::connect(&at, None).is_ok());
    assert_eq!(v.ok(&["sysrq", &uuid, "nmi"]), format!("Sent NMI to VM {uuid}"));
    v.ok(&["delete", &uuid]);
}

#[test]
fn a_password_is_asked_for_and_a_port_can_be_chosen_or_closed() {
    let v = Vmadm::new();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let document = format!(
        r#"{{"brand":"kvm","autoboot":false,"ram":64,"vnc_port":{free},"vnc_password":"geheim"}}"#
    );
    let uuid = v.create(&document);
    v.ok(&["start", &uuid]);
    let at = address(&v, &uuid);
    assert_eq!(at, format!("127.0.0.1:{free}"));
    assert!(Viewer::connect(&at, None).is_err());
    assert!(Viewer::connect(&at, Some("falsch")).is_err());
    assert!(Viewer::connect(&at, Some("geheim")).is_ok());
    v.feed(&["update", &uuid], r#"{"vnc_password":"neu"}"#);
    assert!(Viewer::connect(&at, Some("geheim")).is_err());
    assert!(Viewer::connect(&at, Some("neu")).is_ok());
    // What the plan and the log say of it is not the secret.
    let told = v.lab.ok(&["events", &uuid]) + &v.lab.json(&["inspect", &uuid])["runs"].to_string();
    assert!(!told.contains("geheim") && !told.contains("neu\""), "{told}");
    v.feed(&["update", &uuid], r#"{"vnc_port":-1}"#);
    v.lab.until("the closing", || v.info(&uuid, "vnc")["vnc"].as_object().unwrap().is_empty());
    assert!(std::net::TcpStream::connect(&at).is_err());
    v.ok(&["delete", &uuid]);
}
