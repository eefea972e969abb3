//! Text from elsewhere, such as what KMS says, as it may be shown to people: a terminal acts upon
//! some characters, and shows others as nothing or in another order. They are written as escapes, so
//! that nobody's words clear the screen, forge a line or turn a request id around.
//!
//! What `byokctl` prints for people and the lines of the log go through here.

use std::borrow::Cow;

/// The text, with what would not be seen as what it is written as an escape: `\u{1b}`, `\n`.
#[must_use]
pub fn visible(text: &str) -> Cow<'_, str> {
    if !text.contains(is_hidden) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        if is_hidden(c) {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    Cow::Owned(shown)
}

/// Whether a terminal would act upon it, or show nothing, or what follows in another order.
fn is_hidden(c: char) -> bool {
    // C0 and C1 with line feed and escape, by which terminals are told what to do.
    c.is_control()
        || matches!(
            c,
            // Without width: soft hyphen, marks, joiners, fillers, byte order mark.
            '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}'
            | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}' | '\u{3164}' | '\u{feff}'
            | '\u{ffa0}'
            // Separators of lines and paragraphs; embeddings and overrides of direction.
            | '\u{2028}'..='\u{202e}'
            // Invisible operators, isolates of direction, and what Unicode gave up.
            | '\u{2060}'..='\u{206f}' | '\u{fff0}'..='\u{fffb}'
            // Tags and selectors of variants.
            | '\u{e0000}'..='\u{e0fff}'
        )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_act_upon_is_shown_instead() {
        let said =
            "no\u{1b}[2J\u{1b}[H3 volumes: 3 serving\nzeebe-0  serving\r\t\u{7}\u{9b}1A\u{7f}";
        let shown =
            r"no\u{1b}[2J\u{1b}[H3 volumes: 3 serving\nzeebe-0  serving\r\t\u{7}\u{9b}1A\u{7f}";
        assert_eq!(visible(said), shown);
    }

    #[test]
    fn what_would_turn_text_around_or_not_be_seen_is_shown() {
        let hidden = "\u{202a}\u{202b}\u{202c}\u{202d}\u{202e}\u{2066}\u{2067}\u{2068}\u{2069}\
                      \u{200b}\u{200c}\u{200d}\u{200e}\u{200f}\u{2028}\u{2029}\u{2060}\u{61c}\
                      \u{ad}\u{feff}\u{e0041}\u{3164}";
        let shown = visible(hidden);
        assert!(shown.is_ascii(), "{shown}");
        assert_eq!(shown.matches("\\u{").count(), hidden.chars().count());
        assert_eq!(visible(&shown), shown, "once is enough");
    }

    #[test]
    fn words_of_any_language_stay_as_they_are() {
        for words in ["Zugriff verweigert: größer", "拒绝访问", "דחה", "e\u{301}té", r#"a "b" \ c"#]
        {
            assert!(matches!(visible(words), Cow::Borrowed(same) if same == words), "{words}");
        }
    }
}
