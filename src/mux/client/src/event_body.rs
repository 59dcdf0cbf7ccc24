//! The body of a delivery, read in pieces, so that a large event never needs one large piece of memory.

use cvm_mux_contract::event::BYTES_MAX;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use std::io::Read;

const PIECE: usize = 256 * 1024;

#[derive(Debug)]
pub(crate) enum BodyError {
    TooLarge,
    Broken,
}

/// The pieces of a body. `announced` is its length, where the request says it.
pub(crate) async fn read(mut body: Incoming, announced: Option<u64>) -> Result<Vec<Vec<u8>>, BodyError> {
    let announced = usize::try_from(announced.unwrap_or(PIECE as u64)).unwrap_or(PIECE);
    let piece_for = |rest: usize| Vec::with_capacity(rest.clamp(64, PIECE));
    let mut pieces: Vec<Vec<u8>> = Vec::new();
    let mut piece: Vec<u8> = piece_for(announced);
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| BodyError::Broken)?.into_data() else { continue };
        length += data.len();
        if length as u64 > BYTES_MAX {
            return Err(BodyError::TooLarge);
        }
        if piece.len() + data.len() > PIECE {
            let rest = announced.saturating_sub(length - data.len());
            pieces.push(std::mem::replace(&mut piece, piece_for(rest)));
        }
        piece.extend_from_slice(&data);
    }
    pieces.push(piece);
    Ok(pieces)
}

/// The pieces one after the other.
pub(crate) fn reader(pieces: &[Vec<u8>]) -> Box<dyn Read + '_> {
    let nothing: Box<dyn Read + '_> = Box::new(std::io::empty());
    pieces.iter().fold(nothing, |before, piece| Box::new(before.chain(piece.as_slice())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_read_as_one() {
        let pieces = [b"ab".to_vec(), Vec::new(), b"cde".to_vec()];
        let mut text = String::new();
        reader(&pieces).read_to_string(&mut text).unwrap();
        assert_eq!(text, "abcde");
    }
}
