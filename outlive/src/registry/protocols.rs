//! Which connections the next process can adopt: [`Protocols`]. Each later release adopts what the earlier ones do.

/// Which connections a release can adopt. A later variant includes the earlier ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Protocols {
    /// HTTP/1.1 without TLS: a release from before the handover of HTTP/2 and TLS.
    PlainHttp1,
    /// HTTP/1.1 and HTTP/2, without TLS and with TLS 1.3: a release from before the handover of upgraded connections.
    Http2AndTls,
    /// Upgraded connections too: a release that does not know client certificates, and permits HTTP/2 clients no header
    /// table.
    Upgrades,
    /// Connections whose clients have presented certificates, and HTTP/2 connections with a header table too: a release from
    /// before the handover of TLS 1.2.
    CertificatesAndTables,
    /// TLS 1.2 connections too.
    Tls12,
}

impl Protocols {
    /// In ascending order.
    const VARIANTS: [Self; 5] =
        [Self::PlainHttp1, Self::Http2AndTls, Self::Upgrades, Self::CertificatesAndTables, Self::Tls12];
    /// What this release adopts.
    pub const ALL: Self = Self::Tls12;

    /// The variant of a number that `as u8` returned.
    pub(super) fn from_number(number: u8) -> Self {
        Self::VARIANTS[usize::from(number)]
    }
}

#[cfg(all(test, not(feature = "model-tests")))]
mod tests {
    use super::*;

    #[test]
    fn each_variant_has_its_index_as_number_and_the_last_is_all() {
        for (index, variant) in Protocols::VARIANTS.into_iter().enumerate() {
            assert_eq!(usize::from(variant as u8), index);
            assert_eq!(Protocols::from_number(variant as u8), variant);
        }
        assert_eq!(Protocols::VARIANTS.last(), Some(&Protocols::ALL));
    }
}
