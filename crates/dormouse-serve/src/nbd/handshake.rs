//! The handshake: greeting, options, and what was agreed on for transmission.
//!
//! Every option is read whole before it is answered, so the next one is always found. State that
//! was agreed on before STARTTLS is forgotten by it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use zerocopy::{FromBytes, IntoBytes};

use super::export::{Export, Exports};
use super::limits::{BLOCK_BYTES_PREFERRED, OPTION_BYTES_MAX, OPTIONS_MAX, PAYLOAD_BYTES_MAX};
use super::meta::{self, Match, Selected};
use super::option::{self as data, InfoRequest, MetaRequest};
use super::protocol::{
    EXPORT_NAME_ZEROES, Greeting, InfoBlockSize, InfoExport, NBD_MAGIC, OPTION_MAGIC,
    OPTION_REPLY_MAGIC, OptionHeader, OptionReply, handshake_flag, info, option, rep,
};
use super::tls::{TlsConfig, TlsMode};
use super::transport::Transport;
use crate::error::{Error, Result};

/// The form of replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ReplyForm {
    /// 16 bytes and the data.
    Simple,

    /// Chunks; 32-bit lengths.
    Structured,

    /// Chunks; 64-bit lengths, also in requests.
    Extended,
}

/// What client and server agreed on.
#[derive(Debug)]
pub(crate) struct Agreed {
    pub(crate) export: Arc<Export>,
    pub(crate) form: ReplyForm,
    pub(crate) contexts: Vec<Selected>,
}

/// What a handshake offers.
#[derive(Debug)]
pub(crate) struct Offer<'a> {
    pub(crate) exports: &'a Exports,
    pub(crate) tls: Option<&'a TlsConfig>,

    /// Set when the server is told to stop.
    pub(crate) stopping: &'a AtomicBool,
}

/// Talks until the client enters transmission; `None` where it went away in an orderly fashion.
pub(crate) fn negotiate(
    mut transport: Transport,
    offer: &Offer<'_>,
) -> Result<Option<(Transport, Agreed)>> {
    let greeting = Greeting {
        magic: NBD_MAGIC.into(),
        option_magic: OPTION_MAGIC.into(),
        flags: (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES).into(),
    };
    send(&mut transport, greeting.as_bytes())?;
    let Some(flags) = transport.input.take(4).map_err(receiving)? else { return Ok(None) };
    let flags = u32::from_be_bytes([flags[0], flags[1], flags[2], flags[3]]);
    let known = u32::from(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
    if flags & !known != 0 {
        return Err(Error::protocol(format!("unknown client flags {flags:#x}, known {known:#x}")));
    }
    let mut talk = Talk {
        transport,
        offer,
        no_zeroes: flags & u32::from(handshake_flag::NO_ZEROES) != 0,
        encrypted: false,
        form: ReplyForm::Simple,
        selection: None,
        reply: Vec::with_capacity(1024),
    };
    for _ in 0..OPTIONS_MAX {
        let Some((option, payload)) = talk.receive()? else { return Ok(None) };
        match talk.answer(option, &payload)? {
            Next::Option => talk.send_reply()?,
            Next::Encrypt => talk = talk.encrypt()?,
            Next::Done => {
                // The client may have hung up already, which is its right after ABORT.
                let _ = talk.send_reply();
                return Ok(None);
            }
            Next::Transmission(export) => {
                talk.send_reply()?;
                let contexts = talk.contexts_of(&export);
                let agreed = Agreed { export, form: talk.form, contexts };
                return Ok(Some((talk.transport, agreed)));
            }
        }
    }
    Err(Error::protocol(format!("more than {OPTIONS_MAX} options")))
}

enum Next {
    Option,
    Encrypt,
    Transmission(Arc<Export>),
    Done,
}

/// The data of an option, or that it was too long to be kept.
enum Payload {
    Data(Vec<u8>),
    TooBig,
}

struct Talk<'a> {
    transport: Transport,
    offer: &'a Offer<'a>,
    no_zeroes: bool,
    encrypted: bool,
    form: ReplyForm,

    /// What SET_META_CONTEXT selected, and the export it is bound to.
    selection: Option<(Arc<Export>, Vec<Selected>)>,

    /// The reply to the option at hand.
    reply: Vec<u8>,
}

impl Talk<'_> {
    fn receive(&mut self) -> Result<Option<(u32, Payload)>> {
        let input = &mut self.transport.input;
        let Some(header) = input.take(size_of::<OptionHeader>()).map_err(receiving)? else {
            return Ok(None);
        };
        let Ok(header) = OptionHeader::read_from_bytes(header) else {
            return Err(Error::protocol("an option header of the wrong size"));
        };
        if header.magic.get() != OPTION_MAGIC {
            let got = header.magic.get();
            return Err(Error::protocol(format!("option magic {got:#x}, not {OPTION_MAGIC:#x}")));
        }
        let (option, length) = (header.option.get(), header.length.get());
        if length > OPTION_BYTES_MAX {
            input.discard(u64::from(length)).map_err(receiving)?;
            return Ok(Some((option, Payload::TooBig)));
        }
        let mut payload = vec![0; length as usize];
        input.read_exact(&mut payload).map_err(receiving)?;
        Ok(Some((option, Payload::Data(payload))))
    }

    fn answer(&mut self, option: u32, payload: &Payload) -> Result<Next> {
        let tls_first =
            !self.encrypted && self.offer.tls.is_some_and(|tls| tls.mode() == TlsMode::Required);
        let stopping = self.offer.stopping.load(Ordering::Relaxed);
        if option == option::EXPORT_NAME {
            // It has no way to say no but to hang up.
            return match payload {
                Payload::Data(name) if !tls_first && !stopping => self.export_name(name),
                _ => Err(Error::protocol("EXPORT_NAME without TLS, too long or at the end")),
            };
        }
        if option == option::ABORT {
            self.push(option, rep::ACK, &[]);
            return Ok(Next::Done);
        }
        if stopping {
            return Ok(self.refuse(option, rep::ERR_SHUTDOWN, "the server is stopping"));
        }
        if tls_first && option != option::STARTTLS {
            return Ok(self.refuse(option, rep::ERR_TLS_REQD, "this server wants TLS first"));
        }
        let Payload::Data(payload) = payload else {
            return Ok(self.refuse(option, rep::ERR_TOO_BIG, "more than 64 KiB in an option"));
        };
        let payload = payload.as_slice();
        let takes_nothing =
            [option::LIST, option::STARTTLS, option::STRUCTURED_REPLY, option::EXTENDED_HEADERS];
        if takes_nothing.contains(&option) && !payload.is_empty() {
            return Ok(self.refuse(option, rep::ERR_INVALID, "this option takes no data"));
        }
        Ok(match option {
            option::LIST => self.list(),
            option::STARTTLS => self.start_tls(),
            option::INFO | option::GO => self.info(option, payload),
            option::STRUCTURED_REPLY => match self.form {
                ReplyForm::Simple => self.agree(option, ReplyForm::Structured),
                ReplyForm::Structured => {
                    self.refuse(option, rep::ERR_INVALID, "structured replies are on already")
                }
                ReplyForm::Extended => {
                    self.refuse(option, rep::ERR_EXT_HEADER_REQD, "extended headers are on")
                }
            },
            option::EXTENDED_HEADERS => match self.form {
                ReplyForm::Extended => {
                    self.refuse(option, rep::ERR_INVALID, "extended headers are on already")
                }
                _ => self.agree(option, ReplyForm::Extended),
            },
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.meta_context(option, payload)
            }
            _ => self.refuse(option, rep::ERR_UNSUP, "unknown option"),
        })
    }

    fn export_name(&mut self, name: &[u8]) -> Result<Next> {
        if self.form == ReplyForm::Extended {
            return Err(Error::protocol("EXPORT_NAME after extended headers"));
        }
        let Some(export) = data::export_name(name).and_then(|name| self.offer.exports.find(name))
        else {
            return Err(Error::protocol("EXPORT_NAME of an export that is not there"));
        };
        let export = Arc::clone(export);
        self.reply.clear();
        self.reply.extend(export.device().size_bytes().to_be_bytes());
        self.reply.extend(export.transmission_flags(self.form).to_be_bytes());
        if !self.no_zeroes {
            self.reply.extend([0; EXPORT_NAME_ZEROES]);
        }
        Ok(Next::Transmission(export))
    }

    fn list(&mut self) -> Next {
        let exports = self.offer.exports;
        for export in exports.list() {
            let name = export.name().as_bytes();
            let mut entry = Vec::with_capacity(4 + name.len() + export.describe().len());
            // `Exports` has checked that names are short.
            entry.extend(u32::try_from(name.len()).unwrap_or(0).to_be_bytes());
            entry.extend(name);
            entry.extend(export.describe().as_bytes());
            self.push(option::LIST, rep::SERVER, &entry);
        }
        self.push(option::LIST, rep::ACK, &[]);
        Next::Option
    }

    fn start_tls(&mut self) -> Next {
        if self.encrypted {
            return self.refuse(option::STARTTLS, rep::ERR_INVALID, "TLS is on already");
        }
        if self.offer.tls.is_none() {
            return self.refuse(option::STARTTLS, rep::ERR_POLICY, "this server has no TLS");
        }
        self.push(option::STARTTLS, rep::ACK, &[]);
        Next::Encrypt
    }

    fn info(&mut self, option: u32, payload: &[u8]) -> Next {
        let Some(request) = InfoRequest::parse(payload) else {
            return self.refuse(option, rep::ERR_INVALID, "the option's data is malformed");
        };
        let Some(export) = self.offer.exports.find(request.name) else {
            return self.refuse(option, rep::ERR_UNKNOWN, "no export has this name");
        };
        let export = Arc::clone(export);
        let about = InfoExport {
            info: info::EXPORT.into(),
            size_bytes: export.device().size_bytes().into(),
            flags: export.transmission_flags(self.form).into(),
        };
        self.push(option, rep::INFO, about.as_bytes());
        let block_size = InfoBlockSize {
            info: info::BLOCK_SIZE.into(),
            minimum: 1.into(),
            preferred: BLOCK_BYTES_PREFERRED.into(),
            maximum: PAYLOAD_BYTES_MAX.into(),
        };
        self.push(option, rep::INFO, block_size.as_bytes());
        for (kind, text) in [(info::NAME, export.name()), (info::DESCRIPTION, export.describe())] {
            if request.wants(kind) && !text.is_empty() {
                let mut about = kind.to_be_bytes().to_vec();
                about.extend(text.as_bytes());
                self.push(option, rep::INFO, &about);
            }
        }
        self.push(option, rep::ACK, &[]);
        if option == option::GO { Next::Transmission(export) } else { Next::Option }
    }

    fn meta_context(&mut self, option: u32, payload: &[u8]) -> Next {
        let set = option == option::SET_META_CONTEXT;
        if set {
            // Whatever comes of it, it replaces what was selected before.
            self.selection = None;
        }
        if self.form == ReplyForm::Simple {
            return self.refuse(option, rep::ERR_INVALID, "structured replies come first");
        }
        let Some(request) = MetaRequest::parse(payload) else {
            return self.refuse(option, rep::ERR_INVALID, "the option's data is malformed");
        };
        let Some(export) = self.offer.exports.find(request.name) else {
            return self.refuse(option, rep::ERR_UNKNOWN, "no export has this name");
        };
        let export = Arc::clone(export);
        let extended = self.form == ReplyForm::Extended;
        let found = if set {
            meta::select(export.device(), &request, extended)
        } else {
            meta::list(export.device(), &request, extended)
        };
        let Match::Contexts(found) = found else {
            let why = "a context needs extended headers";
            return self.refuse(option, rep::ERR_EXT_HEADER_REQD, why);
        };
        for selected in &found {
            // Ids mean something for SET only.
            let id = if set { selected.id } else { 0 };
            let mut about = id.to_be_bytes().to_vec();
            about.extend(selected.context.name.as_bytes());
            self.push(option, rep::META_CONTEXT, &about);
        }
        self.push(option, rep::ACK, &[]);
        if set {
            self.selection = Some((export, found));
        }
        Next::Option
    }

    fn agree(&mut self, option: u32, form: ReplyForm) -> Next {
        self.form = form;
        // What contexts are there depends on the form.
        self.selection = None;
        self.push(option, rep::ACK, &[]);
        Next::Option
    }

    fn refuse(&mut self, option: u32, reply: u32, why: &str) -> Next {
        self.reply.clear();
        self.push(option, reply, why.as_bytes());
        Next::Option
    }

    fn push(&mut self, option: u32, reply: u32, payload: &[u8]) {
        let header = OptionReply {
            magic: OPTION_REPLY_MAGIC.into(),
            option: option.into(),
            reply: reply.into(),
            // Names, descriptions and messages are a few KiB.
            length: u32::try_from(payload.len()).unwrap_or(0).into(),
        };
        self.reply.extend(header.as_bytes());
        self.reply.extend(payload);
    }

    fn send_reply(&mut self) -> Result<()> {
        send(&mut self.transport, &self.reply)?;
        self.reply.clear();
        Ok(())
    }

    /// The contexts selected for `export`; none if they were selected for another one.
    fn contexts_of(&mut self, export: &Arc<Export>) -> Vec<Selected> {
        match self.selection.take() {
            Some((selected_for, contexts)) if Arc::ptr_eq(&selected_for, export) => contexts,
            _ => Vec::new(),
        }
    }

    /// Goes on encrypted, with nothing agreed on.
    fn encrypt(mut self) -> Result<Self> {
        self.send_reply()?;
        let Some(tls) = self.offer.tls else {
            return Err(Error::protocol("STARTTLS without TLS"));
        };
        // Somebody on the way could have put plain options before the encrypted ones.
        let Some(reader) = self.transport.input.into_reader() else {
            return Err(Error::protocol("plain bytes after STARTTLS"));
        };
        let (reader, writer) = tls.accept(reader, self.transport.output)?;
        Ok(Talk {
            transport: Transport::new(reader, writer),
            encrypted: true,
            form: ReplyForm::Simple,
            selection: None,
            ..self
        })
    }
}

fn send(transport: &mut Transport, bytes: &[u8]) -> Result<()> {
    transport.output.write_all(bytes).map_err(|error| Error::io("cannot answer an option", error))
}

fn receiving(error: std::io::Error) -> Error {
    Error::io("cannot read an option", error)
}

#[cfg(test)]
mod tests {
    use std::io::{self, Cursor};

    use super::*;
    use crate::device::{BlockDevice, DeviceResult};

    struct Nothing;

    impl BlockDevice for Nothing {
        fn size_bytes(&self) -> u64 {
            0
        }
        fn is_read_only(&self) -> bool {
            true
        }
        fn read_at(&self, _buffer: &mut [u8], _offset: u64) -> DeviceResult<()> {
            Ok(())
        }
    }

    /// What becomes of a client that asks for an export by its name in the oldest way.
    fn oldest_way_in(stopping: bool) -> Result<Option<(Transport, Agreed)>> {
        let export = Export::new("disk", Arc::new(Nothing));
        let exports = Exports::new(Vec::from([export]), None).unwrap();
        let stopping = AtomicBool::new(stopping);
        let offer = Offer { exports: &exports, tls: None, stopping: &stopping };
        let said = Cursor::new(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x04disk".to_vec());
        negotiate(Transport::new(Box::new(said), Box::new(io::sink())), &offer)
    }

    /// All other options were refused.
    #[test]
    fn nobody_comes_in_by_the_oldest_way_while_the_server_stops() {
        assert!(oldest_way_in(false).unwrap().is_some());
        assert!(oldest_way_in(true).is_err());
    }
}
