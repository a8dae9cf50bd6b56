//! A viewer of screens: RFB 3.8 with raw pixels, with and without a password, and a keyboard.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use des::Des;
use des::cipher::{BlockEncrypt, KeyInit};

pub struct Viewer {
    stream: TcpStream,
    pub width: usize,
    pub height: usize,
}

/// What is on the screen: a triple of red, green and blue for each place, line by line.
pub type Picture = Vec<[u8; 3]>;

impl Viewer {
    /// Connects; the error is what the server says against it.
    pub fn connect(address: &str, password: Option<&str>) -> Result<Self, String> {
        let text = |e: std::io::Error| e.to_string();
        let mut stream = TcpStream::connect(address).map_err(text)?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut version = [0; 12];
        stream.read_exact(&mut version).map_err(text)?;
        assert!(version.starts_with(b"RFB 003.00"), "{version:?}");
        stream.write_all(b"RFB 003.008\n").map_err(text)?;
        let mut kinds = vec![0; usize::from(byte(&mut stream)?)];
        stream.read_exact(&mut kinds).map_err(text)?;
        match password {
            None if kinds.contains(&1) => stream.write_all(&[1]).map_err(text)?,
            Some(password) if kinds.contains(&2) => {
                stream.write_all(&[2]).map_err(text)?;
                let mut challenge = [0; 16];
                stream.read_exact(&mut challenge).map_err(text)?;
                stream.write_all(&respond(challenge, password)).map_err(text)?;
            }
            _ => return Err(format!("the server offers {kinds:?}")),
        }
        let mut result = [0; 4];
        stream.read_exact(&mut result).map_err(text)?;
        if result != [0; 4] {
            return Err("the server refuses".into());
        }
        stream.write_all(&[1]).map_err(text)?;
        let mut head = [0; 24];
        stream.read_exact(&mut head).map_err(text)?;
        let mut name = vec![0; u32::from_be_bytes(head[20..].try_into().unwrap()) as usize];
        stream.read_exact(&mut name).map_err(text)?;
        let size = |at: usize| usize::from(u16::from_be_bytes([head[at], head[at + 1]]));
        let mut viewer = Self { width: size(0), height: size(2), stream };
        viewer.prepare();
        Ok(viewer)
    }

    /// Four bytes for each place, blue first; raw pixels, and told when the size changes.
    fn prepare(&mut self) {
        let format = [32, 24, 0, 1, 0, 255, 0, 255, 0, 255, 16, 8, 0, 0, 0, 0];
        self.stream.write_all(&[&[0, 0, 0, 0], &format[..]].concat()).unwrap();
        self.stream.write_all(&[2, 0, 0, 2, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0x21]).unwrap();
    }

    /// The whole screen as it is now.
    pub fn picture(&mut self) -> Picture {
        loop {
            let (width, height) = (self.width as u16, self.height as u16);
            let size = [width.to_be_bytes(), height.to_be_bytes()].concat();
            self.stream.write_all(&[&[3, 0, 0, 0, 0, 0], &size[..]].concat()).unwrap();
            let mut picture = vec![[0; 3]; self.width * self.height];
            if self.update(&mut picture) {
                return picture;
            }
        }
    }

    /// False: the size has changed, so it is to be asked for again.
    fn update(&mut self, picture: &mut Picture) -> bool {
        let mut head = [0; 4];
        loop {
            self.stream.read_exact(&mut head[..1]).unwrap();
            match head[0] {
                0 => break,
                2 => {}
                3 => {
                    let mut length = [0; 7];
                    self.stream.read_exact(&mut length).unwrap();
                    let length = u32::from_be_bytes(length[3..].try_into().unwrap());
                    self.stream.read_exact(&mut vec![0; length as usize]).unwrap();
                }
                other => panic!("message {other}"),
            }
        }
        self.stream.read_exact(&mut head[1..]).unwrap();
        let mut whole = true;
        for _ in 0..u16::from_be_bytes([head[2], head[3]]) {
            let mut head = [0; 12];
            self.stream.read_exact(&mut head).unwrap();
            let part = |at: usize| usize::from(u16::from_be_bytes([head[at], head[at + 1]]));
            let (x, y, width, height) = (part(0), part(2), part(4), part(6));
            if i32::from_be_bytes(head[8..].try_into().unwrap()) == -223 {
                (self.width, self.height) = (width, height);
                whole = false;
                continue;
            }
            let mut pixels = vec![0; width * height * 4];
            self.stream.read_exact(&mut pixels).unwrap();
            for (i, pixel) in pixels.chunks_exact(4).enumerate() {
                let at = (y + i / width) * self.width + x + i % width;
                if let Some(place) = picture.get_mut(at) {
                    *place = [pixel[2], pixel[1], pixel[0]];
                }
            }
        }
        whole
    }

    pub fn type_text(&mut self, text: &str) {
        for letter in text.chars() {
            let key = if letter == '\n' { 0xff0d } else { letter as u32 };
            for down in [1, 0] {
                let event = [&[4, down, 0, 0], &key.to_be_bytes()[..]].concat();
                self.stream.write_all(&event).unwrap();
                std::thread::sleep(Duration::from_millis(30));
            }
        }
    }
}

fn byte(stream: &mut TcpStream) -> Result<u8, String> {
    let mut one = [0];
    stream.read_exact(&mut one).map_err(|e| e.to_string())?;
    Ok(one[0])
}

/// The challenge under the password, whose bits VNC takes the other way round.
fn respond(mut challenge: [u8; 16], password: &str) -> [u8; 16] {
    let mut key = [0; 8];
    for (to, from) in key.iter_mut().zip(password.bytes()) {
        *to = from.reverse_bits();
    }
    let cipher = Des::new(&key.into());
    for block in challenge.chunks_exact_mut(8) {
        cipher.encrypt_block(block.into());
    }
    challenge
}

/// A picture file of the kind P6.
pub fn read_ppm(bytes: &[u8]) -> (usize, usize, Picture) {
    let mut words = Vec::new();
    let mut at = 0;
    while words.len() < 4 {
        let end = bytes[at..].iter().position(u8::is_ascii_whitespace).unwrap() + at;
        words.push(String::from_utf8_lossy(&bytes[at..end]).into_owned());
        at = end + 1;
    }
    assert_eq!(words[0], "P6");
    let pixels = bytes[at..].chunks_exact(3).map(|p| [p[0], p[1], p[2]]).collect();
    (words[1].parse().unwrap(), words[2].parse().unwrap(), pixels)
}
