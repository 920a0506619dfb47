compdef -d gpt-oss-qat scripts/launch launch python python3
if [[ -n "${_gpt_oss_qat_earlier-}" ]]; then compdef "$_gpt_oss_qat_earlier" python python3; fi
unfunction _gpt_oss_qat _gpt_oss_qat_complete _gpt_oss_qat_python
unset _gpt_oss_qat_earlier
