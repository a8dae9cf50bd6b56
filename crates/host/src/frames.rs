//! Memory on its way between two hosts: pieces with their lengths before them, the last one empty.
//! What breaks off is told from what has ended.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// No piece is longer.
pub const LONGEST: usize = 256 << 10;

/// Sends one piece; an empty one is the end.
pub async fn send(to: &mut (impl AsyncWrite + Unpin), piece: &[u8]) -> io::Result<()> {
    let bytes = u32::try_from(piece.len()).map_err(io::Error::other)?;
    to.write_all(&bytes.to_be_bytes()).await?;
    to.write_all(piece).await?;
    to.flush().await
}

/// Copies pieces until the end; how many bytes there were.
pub async fn copy(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
) -> io::Result<u64> {
    let (mut sum, mut piece) = (0, Vec::new());
    loop {
        let bytes = from.read_u32().await? as usize;
        if bytes == 0 {
            to.flush().await?;
            return Ok(sum);
        }
        if bytes > LONGEST {
            let what = format!("a piece of {bytes} bytes; none is longer than {LONGEST}");
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        piece.resize(bytes, 0);
        from.read_exact(&mut piece).await?;
        to.write_all(&piece).await?;
        sum += bytes as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_breaks_off_is_no_end() {
        let mut sent = Vec::new();
        send(&mut sent, b"one").await.unwrap();
        send(&mut sent, &[7; 70_000]).await.unwrap();
        let broken = sent.clone();
        send(&mut sent, b"").await.unwrap();
        let mut whole = Vec::new();
        assert_eq!(copy(&mut sent.as_slice(), &mut whole).await.unwrap(), 70_003);
        assert!(whole.starts_with(b"one\x07"));
        for cut in [broken.len(), broken.len() - 1, 5, 2, 0] {
            let mut read = Vec::new();
            let error = copy(&mut &broken[..cut], &mut read).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{cut}");
        }
        let long = u32::MAX.to_be_bytes();
        let error = copy(&mut long.as_slice(), &mut Vec::new()).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
