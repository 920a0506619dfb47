"""The language of reasoning and answers: every supported language, mixtures, and undecided texts."""

import pytest
from answers import transcript

from pipeline.config.languages import NAMES
from pipeline.evaluate.scorers.language import answer_verdicts, reasoning_verdicts
from pipeline.evaluate.verdicts import figures

TEXTS = {
    "ar": "يسأل المستخدم عن عدد التفاحات المتبقية. كان لديه عشر تفاحات وأعطى ثلاثًا منها لأخته، فيبقى معه سبع تفاحات.",
    "bg": "Потребителят пита колко ябълки са останали. Той имаше десет ябълки и даде три на сестра си.",
    "bn": "ব্যবহারকারী জানতে চান কতগুলি আপেল বাকি আছে। তার দশটি আপেল ছিল এবং সে তিনটি তার বোনকে দিয়েছে।",
    "cs": "Uživatel se ptá, kolik jablek zbývá. Měl deset jablek a tři dal své sestře, takže mu jich zbylo sedm.",
    "da": "Brugeren spørger, hvor mange æbler der er tilbage. Han havde ti æbler og gav tre til sin søster.",
    "de": "Der Nutzer fragt, wie viele Äpfel übrig sind. Er hatte zehn Äpfel und gab seiner Schwester drei davon.",
    "el": "Ο χρήστης ρωτά πόσα μήλα απομένουν. Είχε δέκα μήλα και έδωσε τρία στην αδελφή του, άρα του μένουν επτά.",
    "en": "The user asks how many apples are left. He had ten apples and gave three of them to his sister.",
    "es": "El usuario pregunta cuántas manzanas quedan. Tenía diez manzanas y le dio tres a su hermana.",
    "fa": "کاربر می‌پرسد چند سیب باقی مانده است. او ده سیب داشت و سه تا از آن‌ها را به خواهرش داد.",
    "fi": "Käyttäjä kysyy, montako omenaa on jäljellä. Hänellä oli kymmenen omenaa ja hän antoi kolme siskolleen.",
    "fr": "L'utilisateur demande combien de pommes il reste. Il avait dix pommes et en a donné trois à sa sœur.",
    "he": "המשתמש שואל כמה תפוחים נשארו. היו לו עשרה תפוחים והוא נתן שלושה מהם לאחותו.",
    "hi": "उपयोगकर्ता पूछता है कि कितने सेब बचे हैं। उसके पास दस सेब थे और उसने तीन सेब अपनी बहन को दे दिए।",
    "hu": "A felhasználó azt kérdezi, hány alma maradt. Tíz almája volt, és hármat odaadott a nővérének.",
    "id": "Pengguna bertanya berapa banyak apel yang tersisa. Dia punya sepuluh apel dan memberi tiga kepada adiknya.",
    "it": "L'utente chiede quante mele sono rimaste. Aveva dieci mele e ne ha date tre a sua sorella.",
    "ja": "ユーザーはりんごがいくつ残っているかを尋ねています。りんごは十個あり、妹に三個あげました。",
    "ko": "사용자는 사과가 몇 개 남았는지 묻고 있습니다. 그는 사과 열 개를 가지고 있었고 세 개를 주었습니다.",
    "nl": "De gebruiker vraagt hoeveel appels er over zijn. Hij had tien appels en gaf er drie aan zijn zus.",
    "pl": "Użytkownik pyta, ile jabłek zostało. Miał dziesięć jabłek i dał trzy z nich swojej siostrze.",
    "pt": "O usuário pergunta quantas maçãs sobraram. Ele tinha dez maçãs e deu três delas à sua irmã.",
    "ro": "Utilizatorul întreabă câte mere au rămas. El avea zece mere și i-a dat trei surorii sale.",
    "ru": "Пользователь спрашивает, сколько яблок осталось. У него было десять яблок, и он отдал три своей сестре.",
    "sv": "Användaren frågar hur många äpplen som är kvar. Han hade tio äpplen och gav tre av dem till sin syster.",
    "sw": "Mtumiaji anauliza ni matufaa mangapi yamebaki. Alikuwa na matufaa kumi na akampa dada yake matatu.",
    "ta": "எத்தனை ஆப்பிள்கள் மீதம் உள்ளன என்று பயனர் கேட்கிறார். அவரிடம் பத்து ஆப்பிள்கள் இருந்தன.",
    "te": "ఎన్ని ఆపిల్స్ మిగిలి ఉన్నాయని వినియోగదారు అడుగుతున్నారు. అతని దగ్గర పది ఆపిల్స్ ఉన్నాయి.",
    "th": "ผู้ใช้ถามว่ามีแอปเปิลเหลืออยู่กี่ผล เขามีแอปเปิลสิบผลและให้น้องสาวไปสามผล",
    "tr": "Kullanıcı kaç elma kaldığını soruyor. On elması vardı ve üçünü kız kardeşine verdi, yani yedi elması kaldı.",
    "uk": "Користувач запитує, скільки яблук залишилося. У нього було десять яблук, і він віддав три своїй сестрі.",
    "vi": "Người dùng hỏi còn lại bao nhiêu quả táo. Anh ấy có mười quả táo và đã cho em gái ba quả.",
    "zh": "用户问还剩下多少个苹果。他原来有十个苹果，给了妹妹三个，所以还剩下七个苹果。",
}
CODE = "\n```python\napples_left = apples_before - apples_given  # how many apples are left after that\n```\n"


def test_there_is_a_text_in_every_supported_language() -> None:
    assert TEXTS.keys() == set(NAMES.values())


@pytest.mark.parametrize("name", NAMES)
def test_reasoning_in_the_expected_language_passes(name: str) -> None:
    (found,) = reasoning_verdicts([transcript(reasoning=TEXTS[NAMES[name]], language=name)])
    assert (found.group, found.passed) == (NAMES[name], True)


@pytest.mark.parametrize("code", ["de", "fr", "es", "it", "ru", "zh", "ja"])
def test_reasoning_in_english_fails_even_if_the_answer_passes(code: str) -> None:
    made = transcript(answer=TEXTS[code], reasoning=TEXTS["en"], language=code)
    assert [each.passed for each in reasoning_verdicts([made])] == [False]
    assert [each.passed for each in answer_verdicts([made])] == [True]


@pytest.mark.parametrize("code", ["de", "fr", "es", "it", "ru", "zh", "ja"])
def test_english_code_and_formulas_do_not_count(code: str) -> None:
    made = transcript(reasoning=f"{TEXTS[code]} $10 - 3 = 7$ {CODE}", language=code)
    assert [each.passed for each in reasoning_verdicts([made])] == [True]


def test_half_in_another_language_fails() -> None:
    made = transcript(reasoning=f"{TEXTS['de']} {TEXTS['en']}", language="de")
    assert [each.passed for each in reasoning_verdicts([made])] == [False]


@pytest.mark.parametrize("text", [None, "", "7.", "10 - 3 = 7", CODE])
def test_too_little_text_is_undecided(text: str | None) -> None:
    (found,) = reasoning_verdicts([transcript(reasoning=text, language="de")])
    assert found.passed is None


def test_the_answer_may_have_another_expected_language_than_the_reasoning() -> None:
    made = transcript(answer=TEXTS["es"], reasoning=TEXTS["de"], language="German", answer_language="Spanish")
    assert [each.passed for each in answer_verdicts([made])] == [True]


def test_transcripts_without_an_expected_language_do_not_count() -> None:
    assert reasoning_verdicts([transcript(reasoning=TEXTS["de"])]) == []


def test_each_language_has_figures() -> None:
    made = [
        transcript(prompt_id="1", reasoning=TEXTS["de"], language="German"),
        transcript(prompt_id="2", reasoning=TEXTS["en"], language="German"),
        transcript(prompt_id="3", reasoning=TEXTS["fr"], language="French"),
        transcript(prompt_id="4", reasoning=None, language="French"),
    ]
    found = figures("reasoning_language", reasoning_verdicts(made))
    assert found["reasoning_language"] == pytest.approx(2 / 3)
    assert (found["reasoning_language/de"], found["reasoning_language/fr"]) == (0.5, 1.0)
    assert (found["reasoning_language_undecided/de"], found["reasoning_language_undecided/fr"]) == (0.0, 0.5)
