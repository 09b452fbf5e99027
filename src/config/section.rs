//! The macro that declares a configuration table once and derives from it the struct with its
//! defaults, the overlay that file, environment and flags fill, and the rows of the reference.
//!
//! One declaration per key is the invariant: a key cannot exist in the file and lack a flag, and
//! the README's table cannot name a default that the code does not have.

/// One key of the configuration as the reference shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyDoc {
    /// As written in the file, with its table: `http.listen`.
    pub key: String,
    pub flag: &'static str,
    pub env: &'static str,
    pub default: String,
    pub doc: String,
}

macro_rules! section {
    (
        $(#[$meta:meta])*
        $name:ident, $keys:ident, $table:literal {
            $( $(#[doc = $doc:literal])+ $field:ident: $ty:ty = $default:expr, $flag:literal, $env:literal; )+
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name {
            $( $(#[doc = $doc])+ pub $field: $ty, )+
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $( $field: $default, )+ }
            }
        }

        $(#[$meta])*
        ///
        /// As given by one source: absent keys leave the decision to the next one.
        #[derive(Debug, Clone, Default, clap::Args, serde::Deserialize)]
        #[serde(default, deny_unknown_fields)]
        #[command(next_help_heading = $table)]
        pub struct $keys {
            $(
                $(#[doc = $doc])+
                #[arg(id = $flag, long = $flag, env = $env, value_name = "VALUE")]
                pub $field: Option<$ty>,
            )+
        }

        impl $keys {
            /// These keys where given, else `below`'s.
            #[must_use]
            pub fn over(self, below: Self) -> Self {
                Self { $( $field: self.$field.or(below.$field), )+ }
            }

            /// The keys given, with the defaults of `base` for the others.
            #[must_use]
            pub fn resolve(self, base: $name) -> $name {
                $name { $( $field: self.$field.unwrap_or(base.$field), )+ }
            }
        }

        impl $name {
            /// The rows of the reference, in order of declaration.
            pub fn key_docs() -> Vec<$crate::config::KeyDoc> {
                let defaults = Self::default();
                vec![ $( $crate::config::KeyDoc {
                    key: format!("{}.{}", $table, stringify!($field)),
                    flag: concat!("--", $flag),
                    env: $env,
                    default: defaults.$field.to_string(),
                    doc: concat!($($doc),+).trim().to_owned(),
                } ),+ ]
            }
        }
    };
}

pub(super) use section;
