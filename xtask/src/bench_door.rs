//! Figures of the Connect door: many clients at once, many machines, one daemon. Printed like the
//! others; nothing is asserted.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::bench::{Row, end, median, memory};
use crate::run::command;

/// A connection that is kept.
struct Client(TcpStream);

impl Client {
    fn new(port: u16) -> Result<Self> {
        let stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_nodelay(true)?;
        Ok(Self(stream))
    }

    /// Milliseconds that a call took, and its answer.
    fn call(&mut self, method: &str, body: &str) -> Result<(f64, String)> {
        let begun = Instant::now();
        let request = format!(
            "POST /vmprovisioner.v1.VmService/{method} HTTP/1.1\r\nHost: x\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        self.0.write_all(request.as_bytes())?;
        let mut seen = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        // Answers are chunked; the last chunk is empty.
        while !seen.ends_with(b"0\r\n\r\n") {
            let count = self.0.read(&mut buffer)?;
            if count == 0 {
                bail!("the daemon hung up: {}", String::from_utf8_lossy(&seen));
            }
            seen.extend_from_slice(&buffer[..count]);
        }
        let took = begun.elapsed().as_secs_f64() * 1000.0;
        let text = String::from_utf8_lossy(&seen).into_owned();
        if !text.starts_with("HTTP/1.1 200") {
            bail!("{method}: {text}");
        }
        Ok((took, text))
    }
}

fn serve(lodge: &Path, home: &Path, kernel: &str) -> Result<(Child, u16, String)> {
    let assets = home.join("assets");
    std::fs::create_dir_all(&assets)?;
    std::fs::copy(kernel, assets.join("vmlinux"))?;
    std::fs::write(assets.join("rootfs.ext4"), vec![1; 1 << 20])?;
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let text = format!("[metald]\nassets = [{assets:?}]\nlisten = '127.0.0.1:{port}'\n");
    std::fs::write(home.join("lodge.toml"), text)?;
    let mut child = command(&lodge.to_string_lossy())
        .arg("serve")
        .env("LODGE_HOME", home)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut ready = [0; 6];
    child.stdout.as_mut().context("piped")?.read_exact(&mut ready)?;
    let create = format!(
        "{{\"config\":{{\"cpu\":{{\"vcpu_count\":1}},\"memory\":{{\"size_bytes\":134217728}},\
         \"boot\":{{\"kernel_path\":\"{0}/vmlinux\",\"kernel_args\":\"console=ttyS0 pci=off\"}},\
         \"storage\":[{{\"path\":\"{0}/rootfs.ext4\"}}]}}}}",
        assets.display()
    );
    Ok((child, port, create))
}

fn percentile(list: &mut [f64], percent: usize) -> f64 {
    list.sort_by(f64::total_cmp);
    list[(list.len() * percent).div_ceil(100) - 1]
}

pub(crate) fn rows(lodge: &Path, home: &Path, kernel: &str) -> Result<Vec<Row>> {
    let home = home.join("door");
    std::fs::create_dir_all(&home)?;
    let (child, port, create) = serve(lodge, &home, kernel)?;
    let rows = measure(child.id(), port, &create);
    end(child)?;
    rows
}

fn measure(daemon: u32, port: u16, create: &str) -> Result<Vec<Row>> {
    let mut client = Client::new(port)?;
    // The first looks at the host and unpacks the kernel.
    let (_, made) = client.call("CreateVm", create)?;
    let id = made.split("\"vmId\":\"").nth(1).and_then(|rest| rest.split('"').next());
    let by_id = format!("{{\"vm_id\":\"{}\"}}", id.context("an identity")?);
    let creating = |count: usize| -> Result<Vec<f64>> {
        std::thread::scope(|scope| {
            let clients: Vec<_> = (0..16)
                .map(|_| {
                    scope.spawn(|| -> Result<Vec<f64>> {
                        let mut client = Client::new(port)?;
                        (0..count / 16).map(|_| Ok(client.call("CreateVm", create)?.0)).collect()
                    })
                })
                .collect();
            let lists: Result<Vec<_>> =
                clients.into_iter().map(|c| c.join().expect("no panic")).collect();
            Ok(lists?.concat())
        })
    };
    let mut creates = creating(992)?;
    let mut timed = |method: &str, body: &str, count: usize| -> Result<f64> {
        let list: Result<Vec<f64>> = (0..count).map(|_| Ok(client.call(method, body)?.0)).collect();
        Ok(median(list?))
    };
    let info = timed("GetVmInfo", &by_id, 200)?;
    creating(9008)?;
    let list = timed("ListVms", "{\"page_size\":100}", 50)?;
    let resident = memory(daemon, "VmRSS:", "status");
    let row = |figure, measured, target| Row { figure, measured, target };
    let (p50, p99) = (percentile(&mut creates, 50), percentile(&mut creates, 99));
    Ok(vec![
        row(
            "CreateVm, 16 clients, durable, p50 / p99",
            format!("{p50:.2} / {p99:.2} ms"),
            "to reach: 3 / 15 ms",
        ),
        row("GetVmInfo with 1000 machines, p50", format!("{info:.2} ms"), "to reach: 0.5 ms"),
        row("ListVms of 10000, a page of 100, p50", format!("{list:.2} ms"), "to reach: 5 ms"),
        row("daemon, resident, 10000 machines", format!("{resident:.1} MiB"), "to reach: 64 MiB"),
    ])
}
