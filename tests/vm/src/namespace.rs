//! Network namespaces that a test makes, with links in them as hosts have them. Gone with the test.

use std::fs::File;
use std::net::UdpSocket;
use std::process::Output;
use std::time::Duration;

use crate::lab::command;
use crate::python::must;

pub struct Namespace(String);

impl Namespace {
    pub fn new(name: &str) -> Self {
        let name = format!("lodge-{}-{name}", std::process::id());
        must(command("ip").args(["netns", "add", &name]).output());
        let made = Self(name);
        made.ip("link set lo up");
        made
    }

    pub fn name(&self) -> &str {
        &self.0
    }

    /// Runs `ip` in it.
    pub fn ip(&self, words: &str) {
        must(self.try_ip(words));
    }

    pub fn try_ip(&self, words: &str) -> std::io::Result<Output> {
        command("ip").args(["-n", &self.0]).args(words.split(' ')).output()
    }

    /// A datagram from here to a guest and back; false where nothing comes.
    pub fn echoes(&self, guest: &str) -> bool {
        let guest = guest.to_owned();
        self.visit(move || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            let mut back = [0; 64];
            (0..10).any(|_| {
                // Nobody answers for the address where the guest is not.
                let _ = socket.send_to(b"there and back", (guest.as_str(), 7));
                socket.recv(&mut back).is_ok_and(|length| &back[..length] == b"there and back")
            })
        })
    }

    /// Does something there.
    pub fn visit<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let place = format!("/run/netns/{}", self.0);
        let visit = std::thread::spawn(move || {
            use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
            let file = File::open(place).unwrap();
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), kind).unwrap();
            work()
        });
        visit.join().unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = command("ip").args(["netns", "del", &self.0]).output();
    }
}
