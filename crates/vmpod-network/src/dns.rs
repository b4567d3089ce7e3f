//! Names for guests: their questions go to whomever this host asks, and the answers come back unread.

use std::net::{IpAddr, SocketAddr};

/// The name servers that a `resolv.conf` names, in its order (resolv.conf(5)).
#[must_use]
pub fn servers(resolv_conf: &str) -> Vec<SocketAddr> {
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        (words.next() == Some("nameserver")).then(|| words.next())??.parse::<IpAddr>().ok()
    };
    resolv_conf.lines().filter_map(address).map(|address| SocketAddr::new(address, 53)).collect()
}

/// Whether `answer` can be one to `question`: both are DNS messages of the same number, and it is an answer (RFC 1035, section
/// 4.1.1).
#[must_use]
pub fn answers(question: &[u8], answer: &[u8]) -> bool {
    question.len() >= 12 && answer.len() >= 12 && question[..2] == answer[..2] && answer[2] & 0x80 != 0
}

/// Whether a packet may be a question.
#[must_use]
pub fn is_question(packet: &[u8]) -> bool {
    packet.len() >= 12 && packet[2] & 0x80 == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_servers_of_the_host_are_found() {
        let text = "# nameserver 1.1.1.1\nsearch example.com\nnameserver 127.0.0.53\n nameserver\t::1 # two\nnameserver fe80::1%eth0\nnameserver\noptions ndots:5\n";
        let expected: Vec<SocketAddr> = vec!["127.0.0.53:53".parse().unwrap(), "[::1]:53".parse().unwrap()];
        assert_eq!(servers(text), expected);
    }

    #[test]
    fn questions_and_answers_are_told_apart() {
        let mut question = [0; 12];
        question[1] = 7;
        let mut answer = question;
        answer[2] = 0x80;
        assert!(is_question(&question) && !is_question(&answer) && !is_question(&question[..11]));
        assert!(answers(&question, &answer) && !answers(&question, &question));
        answer[0] = 1;
        assert!(!answers(&question, &answer));
    }
}
